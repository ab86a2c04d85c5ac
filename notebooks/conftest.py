"""What `pytest --nbval notebooks/` runs with: the kernel of this environment, and a limit per cell.

nbval compares the text that each cell prints with the text that is committed. Images are not
compared; what has to differ (times, facts of the machine) is tagged nbval-ignore-output, cell by
cell.
"""

from nbval.plugin import IPyNbFile

from zero_ref.ranks import pool

# Each kernel and each rank would import these anew.
pool.PRELOAD += ["zero_ref.commands.measure", "zero_ref.labs.exercises", "zero_ref.viz",
                 "torch.distributed.fsdp"]


def pytest_configure(config):
    if config.option.nbval:
        config.option.nbval_current_env = True
        config.option.nbval_cell_timeout = 60  # seconds


def pytest_collectstart(collector):
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += ("image/png",)
