"""MyST Markdown as plain Markdown, for readers that know no MyST (Colab): see _pair.py."""

import ast
import re
from itertools import dropwhile, takewhile
from pathlib import Path

import yaml
from pybtex.database import parse_file

BOOK = Path(__file__).resolve().parent
REPOSITORY = yaml.safe_load((BOOK.parent / "_config.yml").read_text("utf-8"))["repository"]
URL, BRANCH = REPOSITORY["url"], REPOSITORY["branch"]
COLAB = URL.replace("github.com", "colab.research.google.com/github")
RAW = f"{URL.replace('github.com', 'raw.githubusercontent.com')}/{BRANCH}/book"
CODE = r"(?<![`}])(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
CODE_OR_ROLE = re.compile(CODE + r"|\{(?P<role>[\w:.-]+)\}`(?P<text>[^`]+)`", re.S)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:)(#?)([\w./-]+)(?:#[\w-]+)?\)")
FENCE = re.compile(r"( *)(`{3,}|~{3,}|:{3,})(?:\{([\w:-]+)\})? *(.*)")
GONE = {"bibliography", "contents", "eval-rst", "tableofcontents", "toctree"}
BARE = {"container", "div", "grid", "margin", "tab-set"}
UNTITLED = {"attention", "caution", "danger", "hint", "important", "note", "seealso", "tip"}
UNTITLED |= {"error", "warning"}


def citation(role: str, keys: str) -> str:
    """'Ye and Pandarinath (2021)' for cite:t, '(Ye and Pandarinath, 2021)' for other roles."""
    entries, found = parse_file(BOOK / "references.bib", bib_format="bibtex").entries, []
    for key in re.split(r"[,;]\s*", keys.strip()):
        if key not in entries:
            raise KeyError(f"citation {key!r} is not in book/references.bib")
        names = [" ".join(p.last_names).strip("{}") for p in entries[key].persons["author"]]
        several = len(names) > 2 or names[-1] == "others"
        who = f"{names[0]} et al." if several else " and ".join(names)
        year = entries[key].fields["year"]
        found.append(f"{who} ({year})" if role == "cite:t" else f"{who}, {year}")
    return ", ".join(found) if role == "cite:t" else f"({'; '.join(found)})"


def title(label: str) -> str:
    """The title of a page, or the heading that follows `(label)=`; else the label's own words."""
    page = BOOK / f"{label.removesuffix('.md')}.md"
    files = [page] if page.is_file() else sorted(BOOK.glob("*.md"))
    pattern = r"^#+ +(.+)$" if page.is_file() else rf"^\({re.escape(label)}\)=\n+#+ +(.+)$"
    found = (re.search(pattern, file.read_text("utf-8"), re.M) for file in files)
    return next((match[1] for match in found if match), re.sub(r"[-_:]", " ", label))


def plain_role(match: re.Match) -> str:
    """An inline role as plain Markdown; a code span as it is."""
    role, text = match["role"], match["text"]
    if role is None:
        return match[0]
    if role.startswith("cite"):
        return citation(role, text)
    shown, target = re.fullmatch(r"(?:(.*?)\s*<)?(.*?)>?", text, re.S).groups()
    words = re.sub(r"^(fig|tab|tbl|table|eq)[-_:]", "", target)
    if role == "doc":
        return page_link(target, shown)
    if role in ("numref", "eq"):
        return (shown or ("%s" if role == "eq" else "Figure %s")).replace("%s", f"({words})")
    if role == "ref":
        return f"*{shown or title(target)}*"
    short = target.split(".")[-1] if target.startswith("~") else shown or target
    return f"${text}$" if role == "math" else f"`{short}`"


def page_link(target: str, text: str | None) -> str:
    """A link to another page: to its twin in Colab if it is a notebook, else to its source."""
    page = BOOK / f"{target.removesuffix('.md')}.md"
    notebook = page.is_file() and page.read_text("utf-8").startswith("---\n")
    name = f"{page.stem}.ipynb" if notebook else page.name
    return f"[{text or title(target)}]({COLAB if notebook else URL}/blob/{BRANCH}/book/{name})"


def plain_link(match: re.Match) -> str:
    """Links between pages and to pictures as addresses that work from anywhere."""
    image, text, local, target = match.groups()
    if image:
        return f"![{text}]({RAW}/{target})"
    if local:
        return f"*{text or title(target)}*"
    page = BOOK / f"{target.removesuffix('.md')}.md"
    return page_link(target, text) if page.is_file() else match[0]


def plain_text(text: str) -> str:
    """A run of prose; each paragraph by itself, so that a stray backtick stays harmless."""
    text = re.sub(r"^(?:\([\w:.-]+\)=|% .*)\n?", "", text, flags=re.M)
    equation = r"\$\$ *\((?:eq[-_:])?([\w:.-]+)\) *$"
    text = re.sub(equation, r"\\tag{\1} $$", text, flags=re.M)
    paragraphs = [CODE_OR_ROLE.sub(plain_role, part) for part in re.split(r"(\n{2,})", text)]
    return LINK.sub(plain_link, "".join(paragraphs))


def included(file: str, pyobject: str, start: str, dedent: str) -> str:
    """The lines of a class or function of a file, from the first one with ``start`` in it."""
    source = (BOOK / file).read_text("utf-8")
    found = ast.parse(source)
    for part in pyobject.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == part)
    lines = source.split("\n")[found.lineno - 1 : found.end_lineno]
    return "\n".join(line[int(dedent) :] for line in dropwhile(lambda x: start not in x, lines))


def plain_directive(name: str, argument: str, body: str) -> str:
    """One directive: exercises and admonitions get a bold heading, solutions are folded."""
    lines = body.split("\n")
    options = list(takewhile(re.compile(r":[\w-]+:( |$)").match, lines))
    body = "\n".join(lines[len(options) :]).strip("\n")
    if name in GONE or name.endswith("-end"):
        return ""
    if name in ("math", "code", "code-block"):
        return f"$$\n{body}\n$$" if name == "math" else f"```{argument}\n{body}\n```"
    if name == "literalinclude":
        how = dict(re.match(r":([\w-]+): *(.*)", option).groups() for option in options)
        code = included(argument, how["pyobject"], how["start-at"], how["dedent"])
        return f"```{how['language']}\n{code}\n```"
    if name in ("figure", "image"):
        return f"![]({RAW}/{argument})\n\n{plain(body)}".strip("\n")
    if name in UNTITLED and argument:
        argument, body = "", f"{argument}\n{body}"
    kind = name.removesuffix("-start").capitalize()
    heading = f"Exercise: {argument}" if kind == "Exercise" and argument else argument or kind
    heading = "Solution" if kind == "Solution" else plain_text(heading)
    if name in ("solution", "dropdown") or any("dropdown" in option for option in options):
        if body:
            return f"<details>\n<summary>{heading}</summary>\n\n{plain(body)}\n\n</details>"
    return plain(body) if name in BARE else f"**{heading}**\n\n{plain(body)}".strip("\n")


def plain(text: str) -> str:
    """MyST Markdown as plain Markdown; code blocks stay as they are."""
    done, prose, rest = [], [], text.split("\n")
    while rest:
        fence = FENCE.fullmatch(line := rest.pop(0))
        indent, ticks, name, argument = fence.groups() if fence else ("", "", None, "")
        if not ticks or (ticks[0] == "`" and "`" in argument):
            prose.append(line)
            continue
        end = re.compile(rf" *{ticks[0]}{{{len(ticks)},}} *")
        size = next((i for i, x in enumerate(rest) if end.fullmatch(x)), len(rest))
        block = "\n".join([line, *rest[: size + 1]])
        if name:
            inside = "\n".join(x.removeprefix(indent) for x in rest[:size])
            block = plain_directive(name, argument, inside).replace("\n", f"\n{indent}")
            block = indent + block if block else ""
        done += [plain_text("\n".join(prose)), block]
        prose, rest = [], rest[size + 1 :]
    return "\n".join([*done, plain_text("\n".join(prose))]).strip("\n")
