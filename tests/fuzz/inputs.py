"""Odd values, odd texts, and valid ones with something changed."""

import copy
import json

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 2, 3, 2**31, 2**63, -(2**64), 10**18, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e39, 1e308)
ODD_FLOATS = (float("nan"), float("inf"), -float("inf"))
WORDS = (
    "",
    " ",
    "a",
    "lora",
    "float32",
    "bfloat16",
    "int8",
    "w",
    "*",
    "**",
    "{a,b}",
    "re:(",
    "../x",
    "/",
    "\0",
    "é",
    "\ud800",
)
TOKENS = (
    b"null",
    b"true",
    b"1e999",
    b"NaN",
    b"-",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u0000",
    b"\xff",
    b"\0",
    b"9" * 400,
)
MOST = 5


def leaves():
    """One value without parts."""
    return st.one_of(
        st.sampled_from([*NUMBERS, *ODD_FLOATS, *WORDS, None, True, False]),
        st.integers(-9, 9),
        st.floats(),
        st.text(max_size=8),
    )


def values(depth=2):
    """Anything that JSON can say, and a little that it cannot."""
    return st.recursive(
        leaves(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=2 * depth,
    )


def _places(tree, at=()):
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*at, key))


def changed(draw, tree):
    """A tree of dicts and lists with up to three values replaced, removed, moved or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        *parents, last = draw(st.sampled_from(places[1:] or [(None,)]))
        if last is None:
            return draw(values())
        node = tree
        for key in parents:
            node = node[key]
        way = draw(st.integers(0, 4))
        if way == 0:
            del node[last]
        elif way == 1:
            node[last] = [node[last]] * draw(st.integers(1, 3))
        elif way == 2 and isinstance(node, dict):
            node[draw(st.sampled_from(WORDS))] = node[last]
        else:
            node[last] = draw(values())
    return tree


def json_text(tree):
    """Text of a tree, of which odd numbers are written as Python writes them."""
    return json.dumps(tree)


def mutated(draw, content):
    """Bytes with up to five changes: bits, spans removed, doubled or overwritten, tokens put in, the end cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, MOST))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        way, n = draw(st.integers(0, 6)), draw(st.integers(1, 16))
        if way == 0 and content:
            content[at] ^= 1 << (n % 8)
        elif way == 1:
            del content[at : at + n]
        elif way == 2:
            content[at:at] = content[at : at + n]
        elif way == 3:
            content[at : at + 8] = draw(st.sampled_from([-1, 0, 1, 2**31, 2**62, 2**63 - 1])).to_bytes(
                8, "little", signed=True
            )
        elif way == 4:
            content[at:at] = draw(st.sampled_from(TOKENS))
        elif way == 5:
            content[at : at + n] = draw(st.binary(max_size=n))
        else:
            del content[at:]
    return bytes(content)
