"""Chat templates: what they see, and what they may not do."""

import pytest

from lorax_kit.models.text.chat import laid_out

TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ['user', 'assistant'] %}
{{ raise_exception('no role ' + m.role) }}
{% endif %}
[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
HELLO = [{"role": "user", "content": " Hi ünï "}]


def test_a_conversation_is_laid_out_as_its_template_says():
    said = laid_out(TEMPLATE, HELLO, special={"bos_token": "<s>", "eos_token": None})
    assert said == "<s>[user] Hi ünï\n"
    both = laid_out(TEMPLATE, [*HELLO, {"role": "assistant", "content": "Ho"}], answer=True)
    assert both == "[user] Hi ünï\n[assistant] Ho\n[assistant]"
    assert laid_out("{{ messages | tojson }}", HELLO) == '[{"role": "user", "content": " Hi ünï "}]'


BAD = [
    (TEMPLATE, [{"role": "judge", "content": "x"}], "cannot lay out these messages: no role judge"),
    (TEMPLATE, [{"role": "user"}], "message 0 is {'role': 'user'}; it must be an object"),
    (TEMPLATE, [], "there are no messages"),
    ("{% for", HELLO, "cannot lay out these messages"),
    ("{{ messages.append(1) }}", HELLO, "cannot lay out these messages"),
    ("{{ ''.__class__.__mro__ }}", HELLO, "cannot lay out these messages"),
]


@pytest.mark.parametrize(("template", "messages", "says"), BAD, ids=range(len(BAD)))
def test_what_a_template_cannot_do_is_said(template, messages, says):
    with pytest.raises(ValueError, match="message") as error:
        laid_out(template, messages)
    assert says in str(error.value)
