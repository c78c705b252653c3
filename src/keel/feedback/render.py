"""What a model wrote, as HTML that can do nothing.

Markdown without raw HTML (markdown-it), then an allow-list of tags and attributes (nh3). Images are named,
not loaded: a page asks no other host for anything. Mathematics is MathML (`mathematics`), and readable TeX in
`<code class="math">` where it is not understood.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from markupsafe import Markup, escape
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin

from keel.feedback import mathematics

LONGEST = 200_000  # characters that are read as Markdown; longer texts are shown as they are
MOST_WORK = 200_000_000  # openers times characters: the end of each may be looked for to the last one
OPENERS = ("[", "\\(", "\\begin{")  # of links, of mathematics
BLOCKS = ("p", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "table", "td", "th")
TAGS = {
    *BLOCKS, "a", "br", "code", "del", "em", "hr", "pre", "s", "span", "strong", "tbody", "thead", "tr",
}  # fmt: skip
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
TOOLS = ("tool", "function")  # roles of results
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)
_UNENDED = re.compile(r"\A\s*<think>(.*)\Z", re.DOTALL)


# a sum of money and what is said after it, between two signs of dollars
_MONEY = re.compile(r"\d[\d.,]*\s[^\\^_{}=<>+*/|]*[^\W\d_]{2}[^\\^_{}=<>+*/|]*")


def _math(self: object, tokens: Sequence[Any], index: int, options: object, env: dict[str, Any]) -> str:
    token = tokens[index]
    tex, block = token.content.strip(), token.type not in ("math_inline", "math_single")
    if token.markup == "$" and len(token.content) < 200 and _MONEY.fullmatch(token.content):
        return escapeHtml(f"${token.content}$")
    budget: mathematics.Budget = env.setdefault("mathematics", mathematics.Budget())
    found = budget.typeset(tex, block)
    if found is not None:
        return f"<p>{found}</p>" if block and token.block else str(found)
    kind = "math block" if block else "math"
    return f'<code class="{kind}">{escapeHtml(tex)}</code>'


def _image(self: object, tokens: Sequence[Any], index: int, options: object, env: object) -> str:
    token = tokens[index]
    return f'<span class="image">{escapeHtml(token.content)} ({escapeHtml(str(token.attrs["src"]))})</span>'


MATHEMATICS = (
    "math_inline", "math_single", "math_block", "math_block_eqno", "math_inline_double", "amsmath",
)  # fmt: skip


def _displayed(state: StateInline, silent: bool) -> bool:
    r"""Mathematics between \[ and \] within a paragraph, as models write it below a line of text."""
    if not state.src.startswith("\\[", state.pos):
        return False
    end = state.src.find("\\]", state.pos + 2, state.posMax)
    if end < 0:
        return False
    if not silent:
        token = state.push("math_inline_double", "math", 0)
        token.content, token.markup = state.src[state.pos + 2 : end], "\\["
    state.pos = end + 2
    return True


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 40})
    parser.enable(["table", "strikethrough"])
    parser.use(
        dollarmath_plugin, allow_space=False, allow_digits=False, allow_labels=False, double_inline=True
    )
    parser.use(texmath_plugin, delimiters="brackets")
    parser.use(amsmath_plugin)
    parser.inline.ruler.before("escape", "displayed", _displayed)
    for name in MATHEMATICS:
        parser.add_render_rule(name, _math)
    parser.add_render_rule("image", _image)
    return parser


_PARSER = _parser()
_CLEANER = nh3.Cleaner(
    tags=TAGS | {*mathematics.ELEMENTS, "mpadded"},
    attributes={
        "a": {"href", "title"},
        "ol": {"start"},
        "td": {"align"},
        "th": {"align"},
        **{tag: set(names - {"class"}) for tag, names in mathematics.ELEMENTS.items() if names - {"class"}},
    },
    allowed_classes={"code": {"math", "block"}, "span": {"image"}, **mathematics.CLASSES},
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
    link_rel="noopener noreferrer nofollow",
    set_tag_attribute_values={
        **{tag: {"dir": "auto"} for tag in BLOCKS},
        "table": {"dir": "auto", "tabindex": "0"},
        "a": {"target": "_blank"},
    },
)


def markdown(text: str) -> Markup:
    """Markdown as HTML without script, style, form, frame, picture or event handler. Each block takes its
    own direction. Texts over `LONGEST` characters, and those that would take seconds to read, as a model that
    repeats itself writes them, are shown as they are."""
    text = without_surrogates(text)
    if len(text) > LONGEST or len(text) * sum(map(text.count, OPENERS)) > MOST_WORK:
        return Markup('<pre dir="auto">{}</pre>').format(text)
    tokens = _PARSER.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):  # the page's own headings come first
            token.tag = f"h{min(6, int(token.tag[1]) + 3)}"
    return Markup(_CLEANER.clean(_PARSER.renderer.render(tokens, _PARSER.options, {})))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model wrote: the tool's name, the arguments as indented JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation, ready for a page."""

    role: str  # "" for plain text
    text: str
    thought: str
    calls: tuple[ToolCall, ...] = ()
    name: str = ""  # of the tool whose result this is

    @property
    def html(self) -> Markup:
        """The text as HTML; a tool's result as it is."""
        return (
            Markup('<pre dir="auto">{}</pre>').format(self.text)
            if self.role == "tool"
            else markdown(self.text)
        )

    @property
    def thought_html(self) -> Markup:
        """The thought before the text as HTML."""
        return markdown(self.thought)


def turns(content: str | Sequence[Mapping[str, Any]]) -> list[Turn]:
    """A prompt or a reply as turns: plain text is one turn without a role."""
    if isinstance(content, str):
        thought, text = split_thought(content)
        return [Turn("", text, thought)]
    return [_turn(message) for message in content]


def _turn(message: Mapping[str, Any]) -> Turn:
    thought = next((str(message[key]) for key in THOUGHT_KEYS if message.get(key)), "")
    text = _text(message.get("content"))
    role = str(message.get("role", ""))
    if role == "assistant" and not thought:
        thought, text = split_thought(text)
    called = message.get("tool_calls")
    calls = tuple(_call(call) for call in called) if isinstance(called, list | tuple) else ()
    name = str(message.get("name") or "") if role in TOOLS else ""  # others are those of models and people
    return Turn(role, text, thought, calls, name)


def blind(content: str | Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    """A prompt or a reply for who must not know its source: of each turn what the pages show, in the usual
    shape. Other keys, numbers of calls and names of speakers may say which model wrote it."""
    return without_surrogates(content) if isinstance(content, str) else [_blind(turn) for turn in content]


def _blind(message: Mapping[str, Any]) -> dict[str, Any]:
    role = str(message.get("role", ""))
    shown: dict[str, Any] = {"role": role, "content": _text(message.get("content"))}
    shown |= {key: str(message[key]) for key in THOUGHT_KEYS if message.get(key)}
    if role in TOOLS and message.get("name"):
        shown["name"] = str(message["name"])
    called = message.get("tool_calls")
    if isinstance(called, list | tuple) and called:
        calls = (_call(call) for call in called)
        shown["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    found: dict[str, Any] = json.loads(without_surrogates(json.dumps(shown, ensure_ascii=False)))
    return found


def without_surrogates(text: str) -> str:
    """A text that can be sent: half of a character, which some models write, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(content: object) -> str:
    """A turn's content: a text, or parts as some chat templates have them."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence):
        return "\n".join(
            str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content
        )
    return json.dumps(content, ensure_ascii=False, indent=2)


def _call(call: object) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping):
        function = {}
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return ToolCall(str(function.get("name", "?")), arguments)
    return ToolCall(str(function.get("name", "?")), json.dumps(arguments, ensure_ascii=False, indent=2))


def split_thought(text: str) -> tuple[str, str]:
    """A reply's thought and what follows it: `<think>…</think>` at its start, also where the opening tag
    stood in the prompt, or where the thought was cut off."""
    if found := _THOUGHT.match(text):
        return found[1].strip(), text[found.end() :]
    if found := _UNENDED.match(text):
        return found[1].strip(), ""
    return "", text


def plain(content: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt or a reply as one plain text: what the raw view and the difference show."""
    if isinstance(content, str):
        return content
    parts: list[str] = []
    for message, turn in zip(content, turns(content), strict=True):
        body = "\n".join(
            [turn.thought] * bool(turn.thought)
            + [turn.text] * bool(turn.text)
            + [f"{call.name}({call.arguments})" for call in turn.calls]
        )
        parts.append(body if len(content) == 1 else f"{message.get('role', '')}: {body}")
    return "\n\n".join(parts)


def excerpt(content: str | Sequence[Mapping[str, Any]], length: int = 120) -> str:
    """The start of what the user asked last, on one line."""
    if not isinstance(content, str):
        asked = [turn.text for turn in turns(content) if turn.role == "user" and turn.text]
        content = asked[-1] if asked else plain(content)
    line = " ".join(content.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def raw(content: str | Sequence[Mapping[str, Any]]) -> Markup:
    """The text as it was written, character by character."""
    return Markup('<pre class="raw" dir="auto">') + escape(plain(content)) + Markup("</pre>")
