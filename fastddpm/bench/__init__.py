"""How fast a configuration runs on this machine: `fastddpm bench`.

Times of a training step, of sampling and of each op; their floor, which is the same matrix products alone; the
utilisation of the hardware, the time by kind of op, and the peak memory.
"""

from .floor import Floor, Layer, floor, flops, record
from .ops import OpTime, measure_ops, table_of
from .parts import time_by_part
from .report import Report, lines_of, measure
from .timing import GpuClock, copy_rate, least, product_rate, times, update_rate
from .work import Work, random_images

__all__ = [
    "Floor",
    "GpuClock",
    "Layer",
    "OpTime",
    "Report",
    "Work",
    "copy_rate",
    "floor",
    "flops",
    "least",
    "lines_of",
    "measure",
    "measure_ops",
    "product_rate",
    "random_images",
    "record",
    "table_of",
    "time_by_part",
    "times",
    "update_rate",
]
