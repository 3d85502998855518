"""Pictures drawn by the sampler ``pyramid``, beside the matmul form of the same sampler."""
