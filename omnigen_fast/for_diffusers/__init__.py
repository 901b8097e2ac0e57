"""enable: diffusers' own OmniGenPipeline on this runtime."""
