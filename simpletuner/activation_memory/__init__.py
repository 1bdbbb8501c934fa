"""Computations that keep little between forward and backward pass.

What autograd saves decides how large a batch fits. Products save what they must; norms, gates and rotations save
several copies of what a moment's work makes again from tensors that are kept anyway. The blocks of every family are
traced, so that these are made again; all of it steps aside under torch.compile, whose own partitioner does the same.
"""
