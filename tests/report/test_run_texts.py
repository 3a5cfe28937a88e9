"""What a run says outside its pages: the record, the summary and the terminal's lines."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from segpipe.errors import RequestError
from segpipe.report.markdown import headline, run_markdown
from segpipe.tables.record import dump_record, load_record
from tests.report.pages import metrics, record, regions, scene, summary


def test_record_round_trip() -> None:
    run = record(scene(reused=("ingest",), notes=("a",)), scene("w", state="failed", geometry=None))
    assert load_record(dump_record(run)) == run
    assert json.loads(dump_record(run))["scenes"][1]["state"] == "failed"
    with pytest.raises(RequestError, match=r"run.json is not a run's record: scenes\.0"):
        load_record('{"job_name":"a","run_id":"b","started":"","finished":"","scenes":[{}]}')


def test_markdown() -> None:
    failed = scene("we|st", state="failed", error="ends\nat | byte <12>", geometry=None)
    text = run_markdown(record(scene(), failed), regions(), metrics(), summary(), "runs/x/report.html")
    assert "**1 of 2 scenes failed** · run run-7 · 2 min 05 s" in text
    assert r"- **we\|st**: ends at \| byte \<12\>" in text
    assert "| mIoU | 0.600 |  | 1 | classes, then scenes |" in text
    assert "| forest | 25.00 | 20.0 % | 0.600 | 0.750 |" in text
    assert "Report: `runs/x/report.html`" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert widths == {6}
    between = summary().assign(low=0.55, high=0.65)
    text = run_markdown(record(), regions(), metrics(), between, "report.html")
    assert "| mIoU | 0.600 | 0.550 to 0.650 | 1 | classes, then scenes |" in text


def test_the_terminals_lines() -> None:
    numbers = pd.concat(
        [summary().assign(low=0.55, high=0.65), summary().assign(metric="mean Cohen's kappa")]
    )
    lines = headline(record(), regions(), metrics(), numbers)
    assert lines == [
        "landcover: 1 of 1 scenes done",
        "  background             100.00 ha   80.0 %  IoU —  Dice —",
        "  forest                  25.00 ha   20.0 %  IoU 0.600  Dice 0.750",
        "  water                    0.00 ha    0.0 %  IoU —  Dice —",
        "  mIoU                    0.600  classes, then scenes (n=1), 95 % interval 0.550 to 0.650",
        "  mean Dice               0.750  classes, then scenes (n=1), 95 % interval 0.550 to 0.650",
    ]
