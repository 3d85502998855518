"""Pretrained networks as denoisers: diffusers folders, latent diffusion, ONNX graphs.

diffusers, onnx and onnxruntime are imported when a model that needs them is loaded.
"""
