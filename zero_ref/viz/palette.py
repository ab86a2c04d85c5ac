"""One meaning per colour, everywhere.

The colours are Okabe and Ito's, which stay apart in all three types of colour blindness, and keep
the hues of figure 1 of the ZeRO paper.
"""

PARAMETERS, GRADIENTS, OPTIMIZER, COMMUNICATION = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
PADDING, INK, PAPER = "#999999", "#222222", "#F2F2F2"
FORWARD, BACKWARD = "#C4C4C4", "#8A8A8A"  # a rank that computes
ALL_TENSORS = "#D55E00"  # model states and everything else
LATE = "#F0E442"  # another rank is waited for

KINDS = {"parameters": PARAMETERS, "gradients": GRADIENTS, "optimizer": OPTIMIZER}
SHORT = {"all_gather": "AG", "reduce_scatter": "RS", "all_reduce": "AR", "broadcast": "BC",
         "all_gather_object": "AG"}


def tint(colour: str, share: float = 0.6) -> str:
    """The colour, mixed with this share of white."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * share):02X}" for c in channels)


def bytes_text(nbytes: float) -> str:
    """1,234 B, 12.3 kB, 1.2 MB, 31.4 GB: in steps of 1000."""
    if nbytes < 10_000:
        return f"{nbytes:,.0f} B"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if round(nbytes, 1) < 1000:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1000:,.1f} TB"
