"""What is trained: LyCORIS adapters attached to a frozen denoiser, or the denoiser itself."""
