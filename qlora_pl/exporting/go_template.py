"""A template's joints -> the Go template of an Ollama Modelfile.

The subset: one system message at most, which comes first; questions and answers by turns; the same
text between messages throughout, and nothing of a message changed but spaces at its ends. What else
a client sends (tools, a system message between turns) ends in an error instead of a prompt that
training never had.
"""

from __future__ import annotations

from qlora_pl.data.conversation import Role
from qlora_pl.data.templates.joints import Joints

SPACES = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f ",
    "\x85\xa0",
    "\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000",
)
"""What Python's ``strip`` (and Jinja's ``trim``) takes away, of one, two and three bytes."""


def go_template(joints: Joints) -> str:
    """The template, which reads ``.Messages`` alone.

    Every text is a literal in ASCII: a Modelfile loses characters that Go calls unprintable, and
    no rule about the spaces around tags applies to a literal.

    An answer at the end is left open, so that the model goes on with it. Ollama drops the oldest
    messages where a conversation does not fit; an answer whose question was dropped is left out.
    """
    lines = [
        *(_trimming() if joints.trimmed else []),
        '{{- $last := "" -}}',
        "{{- range .Messages -}}",
        '{{- if eq .Role "system" -}}',
        "{{- if $last -}}",
        _fail("a system message comes first, or not at all"),
        "{{- end -}}",
        *_system(joints),
        '{{- else if eq .Role "user" -}}',
        '{{- if eq $last "" -}}',
        _literal(joints.opening),
        '{{- else if eq $last "system" -}}',
        _literal(joints.system_to_question),
        '{{- else if eq $last "assistant" -}}',
        _literal(joints.answer_to_question),
        "{{- else -}}",
        _fail("questions and answers take turns"),
        "{{- end -}}",
        _said(joints, "user"),
        '{{- $last = "user" -}}',
        '{{- else if eq .Role "assistant" -}}',
        '{{- if eq $last "user" -}}',
        _literal(joints.question_to_answer),
        _said(joints, "assistant"),
        '{{- $last = "assistant" -}}',
        "{{- end -}}",
        "{{- else -}}",
        _fail("this template knows the roles system, user and assistant"),
        "{{- end -}}",
        "{{- end -}}",
        '{{- if eq $last "user" -}}',
        _literal(joints.cue),
        "{{- end -}}",
    ]
    return "\n".join(line for line in lines if line)


def _system(joints: Joints) -> list[str]:
    if joints.system is None:
        shown = [_fail("this template has no place for a system message")]
    else:
        shown = [_literal(joints.system), _said(joints, "system"), '{{- $last = "system" -}}']
    return shown if joints.shows_empty_system else ["{{- if .Content -}}", *shown, "{{- end -}}"]


def _said(joints: Joints, role: Role) -> str:
    return '{{- template "trimmed" .Content -}}' if role in joints.trimmed else "{{- .Content -}}"


def _literal(text: str) -> str:
    return f"{{{{- {go_string(text)} -}}}}" if text else ""


def go_string(text: str) -> str:
    """A Go string literal in printable ASCII, without a quotation mark inside."""
    escaped = "".join(_escaped(character) for character in text)
    return f'"{escaped}"'


def _escaped(character: str) -> str:
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}
    if character in named:
        return named[character]
    if " " <= character <= "~" and character != '"':
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _fail(sentence: str) -> str:
    # Go's templates have no way to fail but a mistake; this one's message quotes the sentence.
    return f"{{{{- slice {go_string(sentence)} 999 -}}}}"


def _trimming() -> list[str]:
    """Templates that print their text without the spaces at both ends.

    Go's have no function for it, but recursion, and the length of a text that lacks its first byte.
    """
    lines = []
    for name, inner, is_left in (("trimmed", "right-trimmed", True), ("right-trimmed", "", False)):
        lines += [f'{{{{- define "{name}" -}}}}', "{{- if eq (len .) 0 -}}"]
        for size, spaces in enumerate(SPACES, start=1):
            shorter = f"(len (slice . {size}))"
            part = f"(slice . 0 {size})" if is_left else f"(slice . {shorter})"
            rest = f"(slice . {size})" if is_left else f"(slice . 0 {shorter})"
            known = " ".join(go_string(space) for space in spaces)
            lines += [
                f"{{{{- else if and (ge (len .) {size}) (eq {part} {known}) -}}}}",
                f'{{{{- template "{name}" {rest} -}}}}',
            ]
        lines += [
            "{{- else -}}",
            f'{{{{- template "{inner}" . -}}}}' if inner else "{{- . -}}",
            "{{- end -}}",
            "{{- end -}}",
        ]
    return lines
