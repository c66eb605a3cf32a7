"""`bench video` away from a GPU: heads get patterns of their kind, rows and tables, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch

from kompakt.cli.main import main
from kompakt.compress import video_speed as module
from kompakt.compress.device_speed import Ceilings, Machine
from kompakt.compress.video_speed import KINDS, Video, checked, searched, video_speed
from kompakt.compress.video_speed_table import check_video_speeds, video_table

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MACHINE = Machine(CPU, lambda calls: float(len(calls)) and 1e-3, 1, Ceilings(1.0, 1.0, 1.0, 1.0))
SMALL = Video(4, 320, 12, 64)
CHOSEN = {"near": "diagonal", "same": "multi_diagonal", "anchors": "vertical_stripe", "everywhere": "dense"}


def test_heads_get_the_patterns_of_their_kind():
    choice = searched(SMALL, CPU)
    assert [head.pattern.key for head in choice.heads] == [CHOSEN[kind] for kind in KINDS]
    assert all(head.error < 0.1 for head in choice.heads) and 1 / 3 < choice.density < 0.7


def test_rows_and_their_table():
    kept = []
    with mock.patch.object(module, "SMALL", (4, 100)):
        result = video_speed(MACHINE, [SMALL], [], note="Made up.", keep=kept.append)
    (row,) = result["rows"]
    assert row["correct"] and row["microseconds"] == 1000 and row["tokens"] == 1280 and kept == [result]
    assert row["patterns"] == dict(Counter(CHOSEN[kind] for kind in KINDS)) and row["candidates"] == 11
    assert row["search_seconds"] > 0 and row["error"] < 0.35
    # The timer takes everything to last as long: what is visited is then the share.
    assert row["share"] == pytest.approx(row["density"], abs=1e-4)
    table = video_table(json.loads(json.dumps(result)))
    assert "| 4 × 320 | 12 × 64 | 4 dense, 3 diagonal, 3 multi_diagonal, 2 vertical_stripe |" in table
    assert "Made up." in table and "heads of 12 kinds in turn: 3 near, 3 same, 2 anchors, 4 everywhere" in table
    check_video_speeds(result)


def test_a_wrong_kernel_has_no_time():
    video = replace(SMALL, heads=2)
    with mock.patch.object(module, "SMALL", (2, 70)):
        assert checked(video, CPU)["correct"]
        with mock.patch.object(module, "sparse_attention", lambda query, *_, **__: (query, None)):
            result = video_speed(MACHINE, [video], [])
    assert "microseconds" not in result["rows"][0] and "| wrong |" in video_table(result)
    with pytest.raises(RuntimeError, match="1 of 1 results are wrong and have no time; the first is 4 frames of 320"):
        check_video_speeds(result)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--videos", "33"], "video '33' is no frames x tokens of a frame"),
        (["--head-dim", "33"], "head_dim is 33"),
        (["--against", "x"], "unknown peer 'x'"),
    ],
)
def test_refusals(arguments, says, capsys):
    assert main(["bench", "video", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_needs_a_cuda_device(capsys):
    assert main(["bench", "video"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
