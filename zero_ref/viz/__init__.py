"""Pictures of what was recorded. Imported only by those who draw.

One meaning per colour, everywhere. The colours are Okabe and Ito's, which stay apart in all three
types of colour blindness, and keep the hues of figure 1 of the ZeRO paper.
"""

PARAMETERS, GRADIENTS, OPTIMIZER, COMMUNICATION = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
PADDING, INK = "#999999", "#222222"
