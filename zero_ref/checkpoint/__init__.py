"""Checkpoints: sharded, for any stage and any number of ranks, and never half of one."""
