"""The page of a model's parameters: a tree whose sums add up, without network."""

import re

from lorax_kit.report.pages.parameters import tree, write_parameters

FOUND = {
    "model": "a <b>model</b>",
    "parameters": [
        {"path": "head/kernel", "shape": [4, 2], "dtype": "float32"},
        {"path": "body/0/kernel", "shape": [6, 4], "dtype": "float32"},
        {"path": "body/0/bias", "shape": [4], "dtype": "float32"},
        {"path": "body/1/kernel", "shape": [4, 4], "dtype": "float32"},
    ],
    "sites": [
        {"path": "body/0/kernel", "params": 20, "rank": 2, "how": "merged", "reason": "many tokens"},
        {"path": "body/0/kernel", "params": 0, "rank": 2, "how": "factored", "reason": "few tokens"},
        {"path": "body/1/kernel", "params": 16, "rank": 2, "how": "materialised", "reason": "tanh"},
    ],
    "full": ["head/kernel"],
    "bytes": 144,
    "full_bytes": 160,
    "flops_ratio": 0.7,
}


def test_sizes_add_up_and_states_are_told_apart():
    root = tree(FOUND["parameters"], FOUND["sites"], FOUND["full"])
    assert (root.size, root.trained) == (52, 44)
    body = root.children["body"]
    assert (body.size, body.trained) == (44, 36)
    assert body.children["0"].children["kernel"].state == "low-rank"
    assert len(body.children["0"].children["kernel"].notes) == 2
    assert body.children["0"].children["bias"].state == "frozen"
    assert body.children["1"].children["kernel"].state == "materialised"
    assert root.children["head"].children["kernel"].state == "full"


def test_the_page_holds_every_parameter_and_asks_for_nothing(tmp_path):
    page = write_parameters(tmp_path / "deep" / "p.html", FOUND).read_text()
    assert page.count('class="bar low-rank"') == 1
    assert page.count('class="bar materialised"') == 1
    assert "rank 2, materialised: tanh" in page
    assert "a &lt;b&gt;model" in page
    assert not re.search(r"https?://|<script|src=", page)
    assert "84.62%" in page


def test_a_model_without_a_spec_is_all_frozen(tmp_path):
    found = {k: FOUND[k] for k in ("model", "parameters")}
    page = write_parameters(tmp_path / "p.html", found).read_text()
    assert page.count('class="bar frozen"') == 4
