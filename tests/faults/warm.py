"""What the parent of the forked processes imports: all that a run needs. It computes nothing, so it has one thread."""

from __future__ import annotations

import gc
import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

for _name in (
    *("simpletuner.cli", "simpletuner.training.trainer", "simpletuner.models.omnigen.family"),
    *("simpletuner.models.omnigen.pipeline", "simpletuner.reporting.loss_plot", "simpletuner.data.datasets"),
    *("diffusers.models.autoencoders.autoencoder_kl", "transformers", "lycoris", "safetensors.torch", "filelock"),
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "peft", "psutil", "PIL.WebPImagePlugin"),
    *("diffusers.schedulers.scheduling_flow_match_euler_discrete", "simpletuner.launch", "simpletuner.examples"),
    *(
        "pi_heif",
        "bitsandbytes",
        "prodigyopt",
        "schedulefree",
        "PIL.AvifImagePlugin",
        "PIL.ImageCms",
        "PIL.JpegImagePlugin",
        "PIL.GifImagePlugin",
        "numpy.ctypeslib",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "matplotlib.font_manager",
        "torch.utils.tensorboard",
        "pydantic.type_adapter",
        "xml.dom.minidom",
        "tests.runs",
        "tests.tiny",
    ),
):
    importlib.import_module(_name)
gc.freeze()  # or the first collection of each child would copy all of it
