"""The report: a page that needs nothing else, its files, and how it looks where there is a browser."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from pages import Page
from peft import get_peft_model

from peft_esft import ESFTConfig, find_experts, score_experts
from peft_esft.analysis import dispersion, overlap, report
from peft_esft.analysis.adapters import read_adapter
from peft_esft.analysis.drawing import LIGHT, PRINT, _figure, draw_files
from peft_esft.analysis.report_figures import dispersion_plot, overlap_plot, shares_plot
from peft_esft.cli.main import main
from peft_esft.interchange import compact

import golden
import zoo
from families import tiny_model
from oracle import config_for, random_tokens


def numbers(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture(scope="module")
def golden_report(tmp_path_factory):
    scores = {task: golden.load_scores(task) for task in golden.TASKS}
    out = tmp_path_factory.mktemp("report") / "golden.html"
    assert report(scores, out, co_occurrence=golden.load_co_occurrence()) == out
    return out


def test_the_page_needs_nothing_but_itself(golden_report):
    text = golden_report.read_text()
    page = Page(text)
    assert page.images == 8 and len(page.references) == 8 * 5
    for reference in page.references:
        assert reference.startswith("data:")
        kind, content = reference.removeprefix("data:").split(";base64,")
        content = base64.b64decode(content, validate=True)
        if kind == "image/svg+xml":
            ElementTree.fromstring(content)
        if kind == "image/png":
            assert content.startswith(b"\x89PNG")
    # Nothing is fetched by the style either.
    assert "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_titles_say_what_is_seen(golden_report):
    titles = Page(golden_report.read_text()).headings
    assert titles[0] == (
        "For 20% of a layer's choices, intent needs 4.8 of 64 experts and translation needs 3.2; uniform routing "
        "needs 12.8"
    )
    assert "intent and translation share 0.92; two halves of one task 5.58 to 5.65, chance 0.56" in titles[5]
    assert titles[7].startswith("Experts in groups of 8 must train 8.3 experts per layer for what 4.0 do")


def test_the_table_has_the_known_numbers(golden_report):
    cells = Page(golden_report.read_text()).cells
    row = cells.index("intent")
    assert cells[row : row + 7] == ["intent", "8,222", "2.2", "4.8", "15.1", "44.2", "3.6"]


def test_every_figure_has_its_files(golden_report):
    folder = golden_report.with_name("golden_files")
    names = set(Page(golden_report.read_text()).ids)
    files = {(path.stem, path.suffix) for path in folder.iterdir()}
    assert files == {(name, suffix) for name in names for suffix in (".png", ".svg", ".csv")}
    (row,) = (r for r in numbers(folder / "overlap.csv") if (r["task"], r["other"]) == golden.TASKS)
    assert float(row["shared_top_k"]) == pytest.approx(0.923, abs=1e-3)
    shares = numbers(folder / "shares_token_intent.csv")
    assert len(shares) == 26 * 64
    assert sum(float(row["share"]) for row in shares) == pytest.approx(26, rel=1e-4)
    assert sum(int(row["marked"]) for row in shares) / 26 == pytest.approx(4.77, abs=0.01)


@pytest.fixture(scope="module")
def tiny_scores():
    batches = [{"input_ids": random_tokens(4, 80, seed=seed)} for seed in range(8)]
    return score_experts(tiny_model("olmoe"), batches, progress=False)


def test_equal_numbers_give_equal_files_names_are_escaped_and_folders_stay_private(tiny_scores, tmp_path):
    scores = replace(tiny_scores, model=str(tmp_path / "secret" / "base"))
    text = report({"<b>&": scores}, tmp_path / "r.html", title="</title><script>").read_text()
    page = Page(text)
    # Where the model lies is nobody's business.
    assert "base: 2 layers" in text and "secret" not in text
    assert "<b>&" in page.cells and "stability" in page.ids
    plot = shares_plot("<b>&", tiny_scores, "token", 0.2)
    for ending, content in draw_files(plot).items():
        assert (tmp_path / "r_files" / f"shares_token__b__.{ending}").read_bytes() == content


def test_files_of_one_name_are_told_apart_by_their_folders_and_given_once(tiny_scores, tmp_path):
    files = [tmp_path / folder / "scores.json" for folder in ("law", "intent")]
    for file in files:
        file.parent.mkdir()
        tiny_scores.save(file)
    page = Page(report(files, tmp_path / "r.html").read_text())
    assert {"law/scores", "intent/scores"} <= set(page.cells)
    assert {"shares_token_law_scores", "shares_token_intent_scores"} <= set(page.ids)
    with pytest.raises(ValueError, match=r"scores\.json is given twice; give each file and folder once"):
        report([files[0], tmp_path / "intent" / ".." / "law" / "scores.json"], tmp_path / "r.html")


@pytest.mark.parametrize("style", [LIGHT, PRINT])
def test_the_label_of_the_colour_bar_is_inside_of_the_figure(tiny_scores, style):
    figure = _figure(shares_plot("verses", tiny_scores, "token", 0.2), style)
    figure.canvas.draw()
    _, bar = figure.axes
    assert bar.get_ylabel()
    low, high = bar.yaxis.label.get_window_extent().get_points()
    assert low.min() >= 0 and (high <= figure.bbox.max).all()


def test_scores_without_gates(tiny_scores, tmp_path):
    containers = {
        path: replace(c, gate_weight_sum=None, gate_share_sum=None) for path, c in tiny_scores.containers.items()
    }
    page = Page(report(replace(tiny_scores, containers=containers, halves=[]), tmp_path / "r.html").read_text())
    assert page.ids == ["dispersion_token", "shares_token_task", "layers_token"]


def test_titles_of_many_tasks_stay_short(tiny_scores):
    tasks = {f"task {n}": tiny_scores for n in range(7)}
    plot = dispersion_plot({name: dispersion(scores) for name, scores in tasks.items()}, 0.2)
    assert "(3 more tasks below)" in plot.title and len(plot.title) < 200
    assert "two tasks share 2.00" in overlap_plot(overlap(tasks)).title


@pytest.fixture
def adapters(tmp_path):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base), adapter_name="law")
    model.add_adapter("intent", config_for(base, [1, 2], rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "esft_" in name:
                parameter.fill_(0.01)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_adapters_of_a_model_and_their_folders(adapters, tmp_path):
    model, folder = adapters
    page = Page(report(model, tmp_path / "model.html").read_text())
    assert page.ids == ["selection_law", "selection_intent", "adapter_overlap"]
    assert page.headings[0].startswith("law trains 3.0 of 8 experts per layer (3)")
    trained = sum(p.numel() for n, p in model.named_parameters() if "esft_" in n and n.endswith(".law"))
    assert f"{trained:,}" in page.cells
    assert page.headings[2] == "Of the experts that law and intent train, both train 25%"
    page = Page(report([folder / "law", folder / "intent"], tmp_path / "folders.html").read_text())
    assert page.ids == ["selection_law", "selection_intent", "adapter_overlap"]
    changes = [numbers(tmp_path / f"{name}_files" / "selection_intent.csv") for name in ("model", "folders")]
    assert [row["expert"] for row in changes[0]] == [row["expert"] for row in changes[1]] == ["1", "2"] * 2
    # A B of rank 2 and constant factors: every weight changes by scaling * 2 * 0.01 ** 2.
    scaling = model.peft_config["intent"].scaling
    assert float(changes[1][0]["change"]) == pytest.approx(scaling * 2e-4, rel=1e-5)


@pytest.fixture
def stored(tmp_path):
    """A half-precision base and an adapter for it, whose deltas and their root mean squares are returned too."""
    tiny_model("olmoe", torch.bfloat16).save_pretrained(tmp_path / "base")
    base = tiny_model("olmoe", torch.bfloat16)
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, config_for(base, [5, 1, 6]))
    generator = torch.Generator().manual_seed(0)
    squares = {}
    for name, parameter in model.named_parameters():
        if "esft_" in name:
            scale = torch.tensor([1e-3, 2e-3, 4e-3]).view(3, 1, 1)
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
            path = name.removeprefix("base_model.model.").rpartition(".esft_")[0]
            squares.setdefault(path, []).append(parameter.data.square().flatten(1))
    model.save_pretrained(tmp_path / "delta")
    return tmp_path, {path: torch.cat(rows, 1).mean(1).sqrt().tolist() for path, rows in squares.items()}


# The rows are rounded to the base's bf16; one bit keeps the mean, 0.8 of the root mean square of normal numbers.
@pytest.mark.parametrize(("form", "tolerance"), [("rows", 0.1), ("int8", 5e-3), ("int4", 5e-2), ("int1", 0.3)])
def test_the_change_is_that_of_the_weights_in_every_form(form, tolerance, stored):
    folder, expected = stored
    compact(folder / "delta", folder / form, form=form)
    original, record = read_adapter(folder / "delta"), read_adapter(folder / form)
    assert original.change == {path: pytest.approx(row, rel=1e-5) for path, row in expected.items()}
    assert record.change == {path: pytest.approx(row, rel=tolerance) for path, row in expected.items()}
    assert record.num_parameters == original.num_parameters == 2 * 3 * 3 * 32 * 24
    assert record.megabytes < original.megabytes


def test_how_far_rows_moved_is_said_only_beside_their_base(stored, tmp_path):
    folder, _ = stored
    compact(folder / "delta", folder / "rows")
    (folder / "base" / "model.safetensors").unlink()
    for change in (lambda: None, lambda: shutil.rmtree(folder / "base")):
        change()
        assert read_adapter(folder / "rows").change is None
        text = report(folder / "rows", tmp_path / "r.html").read_text()
        assert "across; how far they moved is not known: the file stores the trained weights themselves" in text
        assert "moved furthest" not in text and str(folder) not in text
        assert {row["change"] for row in numbers(tmp_path / "r_files" / "selection_rows.csv")} == {""}


def rewrite(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def test_experts_are_counted_by_the_config_then_by_the_base(tmp_path):
    base = zoo.build("switch_transformers")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    path, container = next(iter(find_experts(base).items()))
    highest = container.num_experts - 2
    get_peft_model(base, ESFTConfig(target_experts={path: [highest]})).save_pretrained(tmp_path / "a")
    for fields, known in (
        ({"base_model_name_or_path": "someone/base"}, True),
        ({"base_model_name_or_path": str(tmp_path / "base"), "base_fingerprint": None}, True),  # no causal LM
        ({"base_model_name_or_path": str(tmp_path)}, False),  # a folder, but none of a model
        ({"base_model_name_or_path": "someone/base"}, False),
    ):
        rewrite(tmp_path / "a", **fields)
        assert read_adapter(tmp_path / "a").num_experts == ({path: container.num_experts} if known else {})
        page = Page(report(tmp_path / "a", tmp_path / "r.html").read_text())
        of = f" of {container.num_experts}" if known else ""
        assert page.headings[0].startswith(f"a trains 1.0{of} experts per layer (1)")


def test_adapters_of_shared_experts_alone_have_a_row_and_no_figure(stored, tmp_path):
    model = get_peft_model(tiny_model("deepseek_v2"), ESFTConfig(train_shared_experts=True))
    model.save_pretrained(tmp_path / "shared")
    trained = sum(p.numel() for n, p in model.named_parameters() if "esft_" in n)
    for subject in (model, tmp_path / "shared"):
        page = Page(report(subject, tmp_path / "r.html").read_text())
        assert page.ids == [] and "0" in page.cells and f"{trained:,}" in page.cells
    page = Page(report([tmp_path / "shared", stored[0] / "delta"], tmp_path / "r.html").read_text())
    assert page.ids == ["selection_delta"] and "shared" in page.cells


def test_layers_that_options_leave_out_hide_no_change(tmp_path):
    base = tiny_model("olmoe")
    model = get_peft_model(base, config_for(base, [2], layers_to_transform=[1], init_weights=False))
    model.save_pretrained(tmp_path / "a")
    record = read_adapter(tmp_path / "a")
    assert record.selection == {"model.layers.1.mlp.experts": [2]}
    assert record.change is not None and record.change["model.layers.1.mlp.experts"][0] > 0


def test_a_selection_without_weights_is_shown(tmp_path):
    ESFTConfig(target_experts={"0": [3, 1], "1": [2]}).save_pretrained(str(tmp_path / "chosen"))
    text = report(tmp_path / "chosen", tmp_path / "r.html").read_text()
    assert Page(text).headings[0] == "chosen trains 1.5 experts per layer (1 to 2)"
    assert "how far they moved is not known without their weights" in text


def test_the_command_takes_both(tiny_scores, adapters, tmp_path, capsys):
    _, folder = adapters
    tiny_scores.save(tmp_path / "law.json")
    arguments = [str(tmp_path / "law.json"), str(folder / "law"), "--out", str(tmp_path / "r.html")]
    assert main(["report", *arguments, "--share", "0.5", "--title", "Law", "--json"]) == 0
    assert str(tmp_path / "r_files" / "dispersion_token.csv") in json.loads(capsys.readouterr().out)["files"]
    page = Page((tmp_path / "r.html").read_text())
    assert {"selection_law", "shares_token_law", "dispersion_token"} <= set(page.ids)
    assert page.headings[0].startswith("For 50% of a layer's choices, law needs")


def test_what_cannot_be_reported_is_refused(tiny_scores, tmp_path, capsys):
    for subject, message in (
        ([], "nothing to report"),
        (torch.nn.Linear(1, 1), "no ESFT adapter"),
        (3, "report takes scores and adapters, not int"),
        ({"a": tiny_scores, "b": golden.scores_of_counts({"x": [1, 2]})}, "different models"),
    ):
        with pytest.raises(ValueError, match=message):
            report(subject, tmp_path / "r.html")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="not an ESFT adapter: its peft_type is 'LORA'"):
        report(tmp_path / "lora", tmp_path / "r.html")
    assert main(["report", str(tmp_path / "missing.json")]) == 1
    assert "missing.json" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_without_matplotlib_the_extra_is_named(tiny_scores, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report(tiny_scores, tmp_path / "r.html")


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, peft_esft.analysis, peft_esft.cli; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page(golden_report, tmp_path, width, dark):
    picture = tmp_path / "page.png"
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000", f"--screenshot={picture}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    subprocess.run([*command, golden_report.as_uri()], check=True, capture_output=True, timeout=120)
    import matplotlib.image

    pixels = matplotlib.image.imread(io.BytesIO(picture.read_bytes()))[..., :3]
    assert pixels.shape[:2] == (3000, width)
    ground = pixels[2, 2].mean()
    assert ground < 0.15 if dark else ground > 0.9
    # Figures are shown: colours of the scale occur, and nothing sticks out to the right.
    blue_to_yellow = (abs(pixels - [1.0, 0.92, 0.27]).sum(-1) < 0.25).mean()
    assert blue_to_yellow > 0.001
    assert abs(pixels[:, -4:] - pixels[2, 2]).max() < 0.05
