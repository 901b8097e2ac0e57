"""The operations of an OmniGen step that are not plain matrix products.

`reference` says what each one computes, in plain PyTorch. `ops` is the one door through which the
runtime calls them. This package imports torch and, where it is there, triton; nothing else.
"""
