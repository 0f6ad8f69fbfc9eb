"""Event files that TensorBoard reads, written so that a run never suffers from them."""

from __future__ import annotations

import contextlib
import io
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar_metadata
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.util import tensor_util

BUCKETS = 30


@dataclass
class Point:
    """Everything that is written of one step."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, np.ndarray] = field(default_factory=dict)  # values, any shape
    images: Mapping[str, np.ndarray] = field(default_factory=dict)  # (H, W, 3) uint8


class EventWriter:
    """Appends to a new event file in `folder`; after the first failure it says so once and does nothing more.

    The file is made at the first write. Where the folder already holds event files, TensorBoard is told to forget
    what they say of later steps than `after`, so that a run that went back to a checkpoint continues its curves.
    Everything written has left this process before a call returns: a killed run loses no point.
    """

    def __init__(
        self,
        folder: Path,
        warn: Callable[[str], None],
        descriptions: Mapping[str, str] | None = None,
        after: int = 0,
    ) -> None:
        """`warn` shows a warning to the user; `descriptions` explain tags in TensorBoard, in Markdown."""
        self.folder = folder
        self.active = True
        self._warn = warn
        self._after = after
        self.continues = after > 0 and any(folder.glob("events.out.tfevents.*"))
        self._descriptions = dict(descriptions or {})
        self._seen: set[str] = set()
        self._stream: BinaryIO | None = None

    def add(self, point: Point, step: int) -> None:
        """Write curves, histograms and pictures of a step."""
        values = [self._value(tag, scalar_metadata, simple_value=float(v)) for tag, v in point.scalars.items()]
        values += [self._value(tag, histogram_metadata, histo=_histogram(v)) for tag, v in point.histograms.items()]
        values += [self._value(tag, image_metadata, image=_image(v)) for tag, v in point.images.items()]
        if values:
            self.write(values, step)

    def add_text(self, tag: str, markdown: str, step: int) -> None:
        """Write words for the Text page."""
        about = text_metadata.create_summary_metadata(display_name=None, description="")
        tensor = tensor_util.make_tensor_proto(np.array([markdown.encode()], dtype=object))
        self.write([Summary.Value(tag=tag, tensor=tensor, metadata=about)], step)

    def add_layout(self, categories: Mapping[str, Sequence[Any]], step: int) -> None:
        """Write the layout of the Custom Scalars page: charts (see `lines`, `margin`) under each category."""
        layout = layout_pb2.Layout(
            category=[
                layout_pb2.Category(title=title, chart=charts, closed=number > 0)
                for number, (title, charts) in enumerate(categories.items())
            ]
        )
        tensor = tensor_util.make_tensor_proto(layout.SerializeToString())
        meta = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=custom_scalar_metadata.PLUGIN_NAME))
        tag = custom_scalar_metadata.CONFIG_SUMMARY_TAG
        self.write([Summary.Value(tag=tag, tensor=tensor, metadata=meta)], step)

    def add_hparams(
        self, settings: Mapping[str, Any], metrics: Mapping[str, str], step: int, foremost: Sequence[str] = ()
    ) -> None:
        """Write what the HParams page lists: settings by name, and the tags (with titles) that tell how it went.

        The `foremost` settings come first there, the others in the order of the alphabet.
        """
        kinds = {bool: api_pb2.DATA_TYPE_BOOL, int: api_pb2.DATA_TYPE_FLOAT64, float: api_pb2.DATA_TYPE_FLOAT64}
        experiment = api_pb2.Experiment(
            hparam_infos=[
                api_pb2.HParamInfo(
                    name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_STRING), differs=name in foremost
                )
                for name, value in settings.items()
            ],
            metric_infos=[
                api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title)
                for tag, title in metrics.items()
            ],
        )
        session = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            if isinstance(value, bool):
                session.hparams[name].bool_value = value
            elif isinstance(value, (int, float)):
                session.hparams[name].number_value = value
            else:
                session.hparams[name].string_value = str(value)
        self.write(
            [
                _of_hparams(hparams_metadata.EXPERIMENT_TAG, experiment=experiment),
                _of_hparams(hparams_metadata.SESSION_START_INFO_TAG, session_start_info=session),
            ],
            step,
        )

    def end_session(self, step: int) -> None:
        """Tell the HParams page that the run came to its end."""
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        self.write([_of_hparams(hparams_metadata.SESSION_END_INFO_TAG, session_end_info=end)], step)

    def write(self, values: Sequence[Summary.Value], step: int) -> None:
        """Write any summary values as one event."""
        if not self.active:
            return
        try:
            stream = self._opened()
            _append(stream, event_pb2.Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            stream.flush()
            if not Path(stream.name).exists():
                raise FileNotFoundError(2, "the event file was deleted")
        except OSError as error:
            self.give_up(f"{self.folder}: {error.strerror or error}")

    def give_up(self, why: str) -> None:
        """Say so once and write nothing more; the run goes on."""
        if self.active:
            self.active = False
            self._warn(f"TensorBoard files can no longer be written ({why}); the run goes on without them.")
        self.close()

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what could be written was flushed before
                self._stream.close()
            self._stream = None

    def _value(self, tag: str, plugin: Any, **content: Any) -> Summary.Value:
        if tag in self._seen:  # TensorBoard keeps what it was first told of a tag
            return Summary.Value(tag=tag, **content)
        self._seen.add(tag)
        about = plugin.create_summary_metadata(display_name=None, description=self._descriptions.get(tag, ""))
        return Summary.Value(tag=tag, metadata=about, **content)

    def _opened(self) -> BinaryIO:
        if self._stream is None:
            older = sorted(self.folder.glob("events.out.tfevents.*"))
            # TensorBoard reads the files of a folder in the order of their names
            stamp = int(time.time())
            if older:
                stamp = max(stamp, int(older[-1].name.split(".")[3]) + 1)
            self._stream = (self.folder / f"events.out.tfevents.{stamp:010d}.ssdkd").open("xb")
            _append(self._stream, event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
            # the second and later starts of a folder make TensorBoard forget; without a first there is no second
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            _append(self._stream, event_pb2.Event(wall_time=time.time(), step=self._after + 1, session_log=start))
        return self._stream


def lines(title: str, tags: Sequence[str]) -> Any:
    """A chart of several curves on the same axes."""
    exact = [f"^{tag}$" for tag in tags]
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=exact))


def margin(title: str, low: str, value: str, high: str) -> Any:
    """A chart of a curve with a band around it."""
    series = layout_pb2.MarginChartContent.Series(value=value, lower=low, upper=high)
    return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=[series]))


def _append(stream: BinaryIO, event: event_pb2.Event) -> None:
    """One record: length, its checksum, content, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    stream.write(length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data)))


def _histogram(data: np.ndarray) -> HistogramProto:
    """Values that are not finite are left out."""
    values = np.asarray(data, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return HistogramProto()
    counts, edges = np.histogram(values, bins=BUCKETS)
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=len(values),
        sum=values.sum(),
        sum_squares=values.dot(values),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def _image(pixels: np.ndarray) -> Summary.Image:
    height, width = pixels.shape[:2]
    return Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=to_png(pixels))


def to_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a PNG file's bytes; fast rather than small."""
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG", compress_level=3)
    return packed.getvalue()


def _of_hparams(tag: str, **content: Any) -> Summary.Value:
    data = plugin_data_pb2.HParamsPluginData(**content)
    meta = hparams_metadata.create_summary_metadata(data)
    return Summary.Value(tag=tag, metadata=meta, tensor=hparams_metadata.NULL_TENSOR)
