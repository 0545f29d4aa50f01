"""`hasten compress`: what it says, what it refuses, and that its result runs."""

from __future__ import annotations

import json
import re


def test_a_model_is_written_and_its_price_and_use_are_named(hasten, tmp_path):
    out = tmp_path / "small"
    result = hasten("compress", "mini-ar", str(out), "--weights", "int4")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith(f"{out}: 6.5 MB before, 1.9 MB now")
    assert "4.63 bits per weight" in lines[1]
    assert re.search(r"relative error of \d\.\d\d%$", lines[1])
    assert f"hasten run {out}" in lines[2]
    assert "--suite perplexity" in lines[3]
    again = hasten("run", str(out), "copy: cat sun pen", "--max-tokens", "24")
    assert again.code == 0
    assert again.out.strip() == "cat sun pen"


def test_facts_as_json(hasten, tmp_path):
    result = hasten("compress", "mini-ar", str(tmp_path / "c"), "--group", "channel", "--embeddings", "int8", "--json")
    facts = json.loads(result.out)
    assert facts["group"] == "channel"
    assert facts["embeddings"] == "int8"
    assert facts["bytes"] < facts["bytes_before"]
    assert facts["rounded_parameters"] > 0.99 * facts["parameters"]


def test_refusals_are_one_line_with_a_way_out(hasten, tmp_path):
    for arguments, message in (
        (("mini-ar", str(tmp_path / "c"), "--weights", "int3"), "weights = 'int3' is not allowed"),
        (("mini-ar", str(tmp_path)), "is there already"),
        (("no-such-model", str(tmp_path / "c")), "unknown model 'no-such-model'"),
    ):
        (tmp_path / "x").write_text("x")
        result = hasten("compress", *arguments)
        assert result.code == 2
        assert message in result.err
        assert result.err.startswith("error: ")
        assert not (tmp_path / "c").exists()
