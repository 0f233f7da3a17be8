"""The room behind :mod:`dropbp_fx.distributed`: agreement of ranks, gradients and sharded parameters."""
