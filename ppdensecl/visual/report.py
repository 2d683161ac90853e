"""One HTML file that tells a run: state, scores, curves, pictures, config, environment, commands. No scripts, no network.

All that comes from files (config, log, scores, paths) is foreign text and is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.interop.safetensors_file import show
from ppdensecl.visual.curves import read_lines, read_log
from ppdensecl.visual.pictures import draw_run, draw_run_curves, drawn_of, identity, read_states

_MOST_BYTES = 50_000_000  # of a score's file
_MOST_OF_A_KIND = 4
_MOST_WARNINGS = 20

_SIZES = re.compile(r"(\d{1,12}) pictures \((\w+)\), (\d{1,9}) iterations an epoch, (\d{1,9}) in all")

_MEASURES = {  # of tools/eval.py's tasks
    "knn": "right classes, of nearest neighbours", "retrieval": "the other view of the same picture comes first",
    "correspondence": "cells matched to within one cell of the truth", "linear": "right classes, of a linear layer",
    "svm": "mean average precision of linear SVMs", "semi": "right classes, fine-tuned on few labels",
    "dense": "mean IoU of a linear segmentation"}

_KINDS = {  # of pictures: (heading, how to read it)
    "views": ("Views", "Pairs of views, the query's left, the key's right. What both show is what the dense branch can match; "
              "where they hardly overlap, it cannot."),
    "matches": ("Matches of cells", "Each cell of the query view (left) and the most similar one of the key view (right). The "
                "truth is known from the crops. A random network is often right where both crops are alike, because zero padding "
                "tells it where a cell is: what counts is what training adds."),
    "mutual": ("Mutual nearest neighbours", "As the paper's figure of correspondences: only cells that are each other's most "
               "similar, with a cosine above the threshold in the title. A random network's features are all alike, so many of "
               "its pass: compare the share that is right, and not how many there are."),
    "similarity": ("One cell against the whole other view", "How similar each cell of the key view is to the framed cell of the "
                   "query view. The cell was chosen by its contrast, not by the result, unless it was asked for. Each map has "
                   "its own scale: look where the maximum lies, and how much of the view is nearly as similar."),
    "pca": ("Features as colours", "Cells of like colour have like features, within a column; colours of two columns do not mean "
            "the same. Pictures are larger than in training, for more cells. Colours that follow the frame and not the picture "
            "come from the zero padding."),
    "retrieval": ("Retrieval", "Views that are nearest by pooled features, with their cosines. Wrong ones tell what the features "
                  "go by: colour, texture, or what is shown. The pictures are those of the training, the views are new."),
}

_STYLE = """
:root { color-scheme: light dark;
  --text: #1d2329; --faint: #59636e; --ground: #fff; --line: #d5dbe1; --block: #f4f6f8; --mark: #0b62c4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ed; --faint: #9aa5b1; --ground: #15191e; --line: #39424c; --block: #1f252c; --mark: #74b2ff; } }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; color: var(--text); background: var(--ground);
  font: 16px/1.5 system-ui, "Noto Sans", sans-serif; }
h1 { margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.6rem 0 .2rem; }
a { color: var(--mark); }
nav a { margin-right: 1rem; }
p { max-width: 46rem; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
.note { border-left: 4px solid #d97706; padding: .3rem .8rem; background: var(--block); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr.open td { border-bottom: none; padding-bottom: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { padding: .7rem; background: var(--block); font-size: .85rem; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: .85rem; overflow-wrap: anywhere; }
figure { margin: 0 0 1rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; }
summary { cursor: pointer; }
@media (max-width: 40rem) { figure .wide img { max-width: none; width: 44rem; } }
@media print {
  body { max-width: none; font-size: 11px; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  h3 + p { break-after: avoid; }
  img { max-height: 12cm; width: auto; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


def write_report(run, out):
    """Writes the report of a run to the file `out`; draws its pictures where they are missing or not of its latest checkpoint.

    Returns None, or why the pictures could not be drawn (as where the data is no longer there): then the report has those that
    are there, and says which checkpoint they are of. Raises UserError where the folder holds no run, or `out` cannot be written.
    """
    run = Path(run)
    lines, log = read_lines(run / "train.log"), read_log(run / "train.log")
    weights = run / f"{checkpoint.LATEST}.pdparams"
    if not weights.is_file():
        raise UserError(f"{run}: holds no checkpoint yet ({weights.name}); wait for the first one")
    draw_run_curves(run)
    missing, latest = None, identity(run / checkpoint.LATEST)
    if not all(_of_kind(run / "pictures", kind) for kind in _KINDS) or _drawn_of_another(run, latest):
        try:
            draw_run(run)
        except UserError as error:
            missing = "; ".join(filter(None, (str(error), _drawn_of_another(run, latest))))
    states = read_states(run / checkpoint.LATEST)
    messages = _messages(lines)
    body = [_headline(run, log, states, messages), _scores(run, states), _pictures(run / "pictures", missing), _config(run),
            _environment(states, messages), _commands(run, messages)]
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_name(run))}</title>\n<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n")
    checkpoint.write_text(out, text.encode("utf-8", "backslashreplace").decode())  # paths may hold bytes that are no text
    return missing


def _drawn_of_another(run, latest):
    """What to say where there are pictures of another checkpoint than that of the identity `latest`; None where there are not."""
    drawn = drawn_of(run)
    if drawn.get("sha256") == latest["sha256"] or not any(_of_kind(run / "pictures", kind) for kind in _KINDS):
        return None
    if not drawn:
        return "it is not known which checkpoint the pictures that are there are of"
    return (f"the pictures that are there are of another checkpoint than the latest: {show(drawn.get('checkpoint'))} of "
            f"iteration {show(drawn.get('iteration'))}")


def _of_kind(folder, kind):
    """kind.png, or kind_0.png, kind_1.png, …"""
    numbered = [path for path in folder.glob(f"{kind}_*.png") if re.fullmatch(r"[0-9]{1,9}", path.stem.partition("_")[2])]
    return sorted(numbered, key=lambda path: int(path.stem.partition("_")[2])) or list(folder.glob(f"{kind}.png"))


def _name(run):
    return run.resolve().name


def _messages(lines):
    """[(time, level, message)] of a log."""
    found = (re.match(r"\[([^]]{1,30})\] ppdensecl ([A-Z]+): (.*)", line) for line in lines)
    return [match.groups() for match in found if match]


# --- the parts -------------------------------------------------------------------------------------------------------


def _headline(run, log, states, messages):
    sizes = [match.groups() for match in (_SIZES.match(message) for _, _, message in messages) if match]
    count, source, per_epoch, total = sizes[-1] if sizes else ("?",) * 4
    saved = states.get("iteration")
    finished = isinstance(saved, int) and total != "?" and saved >= int(total)
    state = "finished" if finished else f"not finished; the checkpoint is of iteration {saved}"
    rows = [("iterations", f"{log['iteration'][-1]} of {total}, {state}"),
            ("pictures", f"{count} ({source}), {per_epoch} iterations an epoch"),
            ("last line of the log", messages[-1][0] if messages else "?")]
    for field, name in (("loss", "loss"), ("loss_global", "global loss"), ("loss_dense", "dense loss"),
                        ("accuracy", "accuracy against the queue"), ("dense_accuracy", "dense accuracy against the queue"),
                        ("avg_ips", "pictures / s")):
        known = [(value, at) for value, at in zip(log.get(field, ()), log["iteration"]) if value is not None]
        if known:
            value, at = known[-1]
            rows.append((f"{name}, last", f"{value:.4g}" + (f" (iteration {at})" if at < log["iteration"][-1] else "")))
    links = " ".join(f'<a href="#{name.lower()}">{name}</a>'
                    for name in ("Scores", "Curves", "Pictures", "Config", "Environment", "Commands"))
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return (f'<h1>{escape(_name(run))}</h1>\n<p class="faint">A pre-training run of ppdensecl: <code>{escape(str(run))}</code></p>\n'
            f"<table>{table}</table>\n<nav><p>{links}</p></nav>")


def _scores(run, states):
    digests, rows = states.get("sha256"), []
    latest = digests.get(".pdparams") if isinstance(digests, dict) else None
    for score in _score_files(run):
        options, note = score.get("options"), ""
        control = " (control: shuffled)" if isinstance(options, dict) and options.get("shuffle_labels") else ""
        if latest and score.get("checkpoint_sha256") not in (None, latest):
            name = escape(str(score.get("checkpoint")))
            note = f"<br><span class=faint>another checkpoint than the latest: {name}</span>"
        numbers = "".join(f'<td class="number">{_percent(score.get(name))}</td>' for name in ("trained", "random", "chance"))
        measure = f"{escape(score['task'])}{control}<br><span class=faint>{_MEASURES.get(score['task'], '')}</span>"
        rows.append(f'<tr class="open"><td>{measure}</td>{numbers}</tr>\n'
                    f'<tr><td colspan="4"><code>python {escape(str(score.get("command", "?")))}</code>{note}</td></tr>')
    if not rows:
        found = "<p>None yet: the commands below write them to this run's folder, where the report finds them.</p>"
    else:
        head = "".join(f'<th class="number">{name}</th>' for name in ("trained", "random start", "chance"))
        found = f'<div class="wide"><table><tr><th>score</th>{head}</tr>{"".join(rows)}</table></div>'
    return f'<h2 id="scores">Scores</h2>\n{found}'


def _score_files(run):
    """What the files in the run's folder hold that tools/eval.py --out wrote; other JSON is left out."""
    for path in sorted(run.glob("*.json")):
        try:
            score = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MOST_BYTES else None
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(score, dict) and isinstance(score.get("task"), str) and "trained" in score:
            yield score


def _percent(value):
    return f"{100 * value:.1f} %" if isinstance(value, (int, float)) and 0 <= value <= 1 else "–"


def _pictures(folder, missing):
    parts = ['<h2 id="curves">Curves</h2>', _figure(
        folder / "curves.png", "Losses below the dashed line are better than chance; they rise first, while the queue fills with "
        "real keys. A share near 1 that is matched to its own position means that cells are told by where they are, not by what "
        "they show.", "PNG"), '<h2 id="pictures">Pictures</h2>']
    if missing:
        parts.append(f'<p class="note">New pictures could not be drawn: {escape(missing)}</p>')
    for kind, (heading, reading) in _KINDS.items():
        paths = _of_kind(folder, kind)
        if paths:
            left = len(paths) - _MOST_OF_A_KIND
            more = f" ({left} more in the run's folder)" if left > 0 else ""
            parts.append(f"<h3>{heading}</h3>\n<p>{escape(reading)}{more}</p>")
            parts += [_figure(path, "", "JPEG") for path in paths[:_MOST_OF_A_KIND]]
    return "\n".join(parts)


def _figure(path, caption, kind):
    """A picture of the run's folder in the page, as PNG or JPEG."""
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); delete it, and it is drawn again") from None
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 85, "subsampling": 0} if kind == "JPEG" else {"optimize": True}))
    data = base64.b64encode(file.getvalue()).decode()
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (f'<figure><div class="wide"><img alt="{escape(path.stem)}" width="{picture.width}" height="{picture.height}" '
            f'src="data:image/{kind.lower()};base64,{data}"></div>{text}</figure>')


def _config(run):
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8", errors="replace")
    return f'<h2 id="config">Config</h2>\n<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>'


def _environment(states, messages):
    starts = [f"{time}: {message}" for time, _, message in messages if re.match(r"ppdensecl \d|resumed from ", message)]
    versions = states.get("versions")
    if isinstance(versions, dict):
        starts.append("latest checkpoint: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    warnings = [f"{time} {level}: {message}" for time, level, message in messages if level != "INFO"]
    parts = ['<h2 id="environment">Environment</h2>', f"<pre>{escape(chr(10).join(starts))}</pre>"]
    if warnings:
        left = len(warnings) - _MOST_WARNINGS
        more = f"<p>{left} earlier ones are in train.log.</p>" if left > 0 else ""
        parts.append(f"<h3>Warnings and errors of the log ({len(warnings)})</h3>{more}"
                     f"<pre>{escape(chr(10).join(warnings[-_MOST_WARNINGS:]))}</pre>")
    return "\n".join(parts)


def _commands(run, messages):
    said = [message.partition("command: ")[2] for _, _, message in messages if message.startswith("command: ")]
    folder = shlex.quote(str(run))
    again = f"python tools/train.py -c {folder}/config.yaml -o output_dir=output/again"
    lines = ["# trained with", *(f"python {command}" for command in dict.fromkeys(said))] if said else [
        "# train it again (the log holds no command)", again]
    lines += ["", "# pictures, and this report", f"python tools/visualize.py {folder}", f"python tools/report.py {folder}",
              "", "# scores, for this report",
              *(f"python tools/eval.py -c {folder}/config.yaml --checkpoint {folder}/latest --task {task} "
                f"--out {folder}/{task}.json" for task in ("correspondence", "retrieval")),
              "", "# the backbone for PaddleSeg; or paddledet, paddleclas, torch",
              f"python tools/export_finetune.py {folder}/latest --to paddleseg --out seg.pdparams"]
    return f'<h2 id="commands">Commands</h2>\n<pre>{escape(chr(10).join(lines))}</pre>'
