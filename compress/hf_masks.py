"""transformers' attention masks as runs of keys: what a mask function means, without building the mask.

transformers describes a mask by nested functions of (batch, head, query, key). The registered mask function keeps its
arguments in a `MaskInfo`, which travels to every attention layer of a forward pass and is worked out there once:

    causal, window       read off the functions, told apart by where they are defined
    padding, packing     `Segments`, from the padding mask or the document of every token
    static caches        keys past the last query are cut off

Anything else (chunks, blocks, unions, functions of a model's own) has a reason instead, and attention then runs as it
did before, with the mask that transformers builds from the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)

from ..kernels.decode_attention import CompressedKV
from ..kernels.segments import Segments

HOME = "transformers.masking_utils"
READ_BY_MODEL = "the model reads its attention mask itself; kompakt's attention cannot run it, unpatch it"


@dataclass(frozen=True)
class Layout:
    """causal, window, segments: as `kernels.attention.prefill_attention` takes them; keys: how many, from the first."""

    causal: bool
    window: int | None
    segments: Segments | None
    keys: int


@dataclass(frozen=True)
class Pattern:
    """What a mask function allows. one_sided: its window looks back only. documents: (batch or 1, tokens), the document
    of every token; positions: likewise, the positions that the rest of the function was given.
    """

    causal: bool = False
    window: int | None = None
    one_sided: bool = False
    documents: Tensor | None = None
    positions: Tensor | None = None

    def __and__(self, other: Pattern) -> Pattern:
        """Both. ValueError where the two do not come to one pattern."""
        windows = [window for window in (self.window, other.window) if window is not None]
        return Pattern(
            self.causal or other.causal,
            min(windows, default=None),
            self.one_sided or other.one_sided,
            _only(self.documents, other.documents, "two packings"),
            _only(self.positions, other.positions, "two numberings of tokens"),
        )


def _only(one: Tensor | None, other: Tensor | None, what: str) -> Tensor | None:
    if one is not None and other is not None and one is not other:
        raise ValueError(f"the mask has {what}")
    return other if one is None else one


def read_mask_function(function: Callable) -> Pattern:
    """What a mask function of transformers allows. ValueError with the reason if that is no run of keys."""
    if function is causal_mask_function:
        return Pattern(causal=True)
    if function is bidirectional_mask_function:
        return Pattern()
    name = getattr(function, "__qualname__", type(function).__name__)
    if getattr(function, "__module__", None) != HOME:
        raise ValueError(f"the mask has a function of the model's own, {name}")
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    held = {key: cell.cell_contents for key, cell in zip(code.co_freevars if code else (), cells, strict=True)}
    maker = name.partition(".<locals>")[0]
    match maker, held:
        case "and_masks", {"mask_functions": functions}:
            found = Pattern()
            for item in functions:
                found = found & read_mask_function(item)
            return found
        case "sliding_window_overlay", {"sliding_window": int(window)}:
            return Pattern(window=window, one_sided=True)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(window)}:
            # Theirs counts the distance, ours the keys.
            return Pattern(window=window + 1)
        case "packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as documents}:
            return Pattern(documents=documents)
        case "remap_positions_for_packed_sequence", {"mask_function": inner, "position_ids": Tensor() as positions}:
            return read_mask_function(inner) & Pattern(positions=positions)
    raise ValueError(f"the mask is made by {maker}, which is no run of keys")


@dataclass
class MaskInfo:
    """Arguments of one mask of one forward pass, in place of the mask.

    implementation: what will run the calls that kompakt does not. arguments: as transformers gives them to a mask
    function. checked: what was asked of it already, by whoever asked. ndim, shape and `contiguous` are what `generate`
    asks of a prepared mask.
    """

    implementation: str
    arguments: dict[str, Any]
    ndim: int = 0
    shape: tuple[int, ...] = ()
    layouts: dict[torch.device, Layout | str] = field(default_factory=dict)
    built: dict[tuple[str, torch.device], Tensor | None] = field(default_factory=dict)
    starts: dict[torch.device, Tensor | str] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)

    def contiguous(self) -> MaskInfo:
        """Itself."""
        return self

    def __getitem__(self, index: Any) -> Any:
        """The mask of the last queries, as ``mask[:, :, -n:, :]`` of a model that drops the others.

        ValueError for anything else: a model that works on the mask cannot be patched.
        """
        every = slice(None)
        match index:
            case (batch, heads, slice(start=int(start), stop=None, step=None), keys) if start <= 0:
                if (batch, heads, keys) == (every, every, every):
                    queries = self.arguments["q_length"]
                    left = min(-start, queries) or queries
                    offset = self.arguments["q_offset"] + queries - left
                    return keep_arguments(
                        self.implementation, **{**self.arguments, "q_length": left, "q_offset": offset}
                    )
        raise ValueError(READ_BY_MODEL)

    def __getattr__(self, name: str) -> Any:
        """AttributeError that says what the model did."""
        raise AttributeError(f"{READ_BY_MODEL} ({name})")

    def build(self, implementation: str, device: torch.device) -> Tensor | None:
        """The mask that an attention implementation of transformers expects, built once for all layers."""
        key = (implementation, device)
        if key not in self.built:
            mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
            self.built[key] = None if mask is None else mask.to(device)
        return self.built[key]

    def layout(self, batch: int, queries: int, keys: int, device: torch.device) -> Layout | str:
        """What the mask means for a call with so many queries and keys, or why it cannot be said."""
        given = tuple(self.arguments[name] for name in ("batch_size", "q_length", "kv_length"))
        if given != (batch, queries, keys):
            return "the mask was made for another number of queries or keys"
        if device not in self.layouts:
            try:
                self.layouts[device] = self.work_out(device)
            except ValueError as error:
                self.layouts[device] = str(error)
        return self.layouts[device]

    def key_starts(self, layout: Layout) -> Tensor | str | None:
        """(batch,) int64: the first column of each row that is no padding, columns counted from the first token that
        ever came; None if that is 0 everywhere. Or why rows do not have one.
        """
        segments, batch, queries = layout.segments, self.arguments["batch_size"], self.arguments["q_length"]
        if segments is None:
            return None
        device = segments.table.device
        if device not in self.starts:
            rows, _, q_stop, _, k_stop = segments.table.cpu().long().unbind(dim=1)
            left = rows.tolist() == list(range(batch)) and bool(((q_stop == queries) & (k_stop == layout.keys)).all())
            # The mask counts from its first key on.
            start = segments.table[:, 3].long() + int(self.arguments["kv_offset"])
            self.starts[device] = start if left else "rows are packed, or end in padding"
        return self.starts[device]

    def work_out(self, device: torch.device) -> Layout:
        """See `layout`. ValueError with the reason. Waits for the device where there is padding or packing."""
        pattern = read_mask_function(self.arguments["mask_function"])
        queries, keys = self.arguments["q_length"], self.arguments["kv_length"]
        if pattern.one_sided and not pattern.causal:
            raise ValueError("the mask has a window to one side without being causal")
        q_offset, kv_offset = (int(self.arguments[name]) for name in ("q_offset", "kv_offset"))
        stop = q_offset + queries - kv_offset
        if pattern.causal:
            # The op's last query sits on its last key; whatever a static cache holds after that is seen by no query.
            if not queries <= stop <= keys:
                raise ValueError("the mask's queries do not end at its keys")
            keys = stop
        elif pattern.window is not None and stop != keys:
            raise ValueError("the mask has a window over queries that do not end at its keys")
        window = None if pattern.window is None or pattern.window >= keys else pattern.window
        padding = self.padding(kv_offset, keys)
        if pattern.documents is not None or pattern.positions is not None:
            if padding is not None:
                raise ValueError("the mask has both padding and packed sequences")
            segments = packed_segments(pattern, self.arguments["batch_size"], queries, keys)
        else:
            segments = None if padding is None else padding_segments(padding, queries, stop)
        if segments is not None:
            segments = replace(segments, table=segments.table.to(device))
        return Layout(pattern.causal, window, segments, keys)

    def padding(self, kv_offset: int, keys: int) -> Tensor | None:
        """(batch, keys) bool, True for a token; None where every key is one."""
        mask = self.arguments.get("attention_mask")
        if mask is None:
            return None
        if mask.ndim != 2:
            raise ValueError(f"the padding mask has {mask.ndim} dimensions")
        mask = mask[:, kv_offset : kv_offset + keys].bool()
        if mask.shape[1] < keys:
            mask = torch.nn.functional.pad(mask, (0, keys - mask.shape[1]))
        return None if bool(mask.all()) else mask


def padding_segments(padding: Tensor, queries: int, stop: int) -> Segments:
    """Segments of a padded batch. ValueError with the reason if there are none."""
    if stop != padding.shape[1]:
        raise ValueError("the mask pads keys that are not those of its queries")
    segments = Segments.from_padding(padding, queries)
    if segments is None:
        raise ValueError("the padding mask has holes")
    return segments


def packed_segments(pattern: Pattern, batch: int, queries: int, keys: int) -> Segments:
    """Segments of packed sequences. ValueError with the reason if there are none."""
    documents, positions = pattern.documents, pattern.positions
    if documents is None:
        raise ValueError("the mask numbers tokens anew without packing them")
    if queries != keys or documents.shape[1] != keys:
        raise ValueError("the mask packs sequences beside a cache")
    if positions is not None:
        steps = (positions.diff(dim=1) == 1) | (documents.diff(dim=1) != 0)
        if not bool(steps.all()):
            raise ValueError("the mask's positions do not count up within a packed sequence")
    segments = Segments.from_documents(documents.expand(batch, -1))
    if segments is None:
        raise ValueError("a packed sequence is not in one piece")
    return segments


def keep_arguments(implementation: str, **arguments: Any) -> Any:
    """The registered mask function: a `MaskInfo`, or for one query the mask of `implementation`, which will run it."""
    if arguments["q_length"] == 1 and not isinstance(arguments.get("attention_mask"), MaskInfo):
        arguments.setdefault("mask_function", causal_mask_function)
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**arguments)
    return keep_every_mask(implementation, **arguments)


def keep_every_mask(implementation: str, **arguments: Any) -> Any:
    """The registered mask function of models with a compressed cache: a `MaskInfo`."""
    given = arguments.get("attention_mask")
    if isinstance(given, MaskInfo):
        return given
    arguments.setdefault("mask_function", causal_mask_function)
    for name in ("q_offset", "kv_offset"):
        offset = arguments.setdefault(name, 0)
        # A static cache counts its tokens in place, before any layer asks what this mask means.
        arguments[name] = offset.clone() if isinstance(offset, Tensor) else offset
    return MaskInfo(implementation, arguments)


def check_kept_mask(mask: MaskInfo, kv: CompressedKV) -> None:
    """ValueError if a mask hides other evicted columns than when their tokens were chosen; no mask hides none."""
    if "kept" in mask.checked:
        return
    given, starts = mask.arguments.get("attention_mask"), kv.sink_starts
    if given is None:
        same = not bool(starts.any())
    else:
        shown = torch.arange(kv.first, device=given.device) >= starts.to(given.device)[:, None]
        same = given.ndim == 2 and torch.equal(given[:, : kv.first].bool(), shown)
    if not same:
        raise ValueError("the mask is not the one that tokens were evicted under; it may only grow by ones")
    mask.checked.add("kept")
