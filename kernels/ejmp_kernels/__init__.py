"""Tensors in, tensors out: the operations ejmp's models are made of. Knows nothing of files, training or ejmp.

`specification` has every operation in plain torch; `registry` loads the compiled ones and those of Triton.
"""
