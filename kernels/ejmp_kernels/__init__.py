"""Tensors in, tensors out: the operations ejmp's models are made of. Knows nothing of files, training or ejmp.

`reference` is the specification of every operation in plain torch; `extension` loads the compiled ones.
"""
