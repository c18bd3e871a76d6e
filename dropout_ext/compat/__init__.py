"""The names and signatures of other libraries' fused dropout, so that a change of the import is all
that a model needs: :mod:`dropout_ext.compat.flash_attn` and :mod:`dropout_ext.compat.megatron`.
"""
