"""What a run leaves behind and shows: its folder, its metrics, the live display, the pictures."""

from ssdkd.tracking.display import Display
from ssdkd.tracking.folder import RunFolder
from ssdkd.tracking.metrics import MetricsFile
from ssdkd.tracking.pictures import buffer_grid

__all__ = ["Display", "MetricsFile", "RunFolder", "buffer_grid"]
