"""Networks that others trained, as denoisers: diffusers folders, latent diffusion, ONNX graphs.

diffusers, onnx and onnxruntime are imported when a model that needs them is loaded, not before.
"""
