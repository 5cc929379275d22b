"""What mkdocs does to pages: formulas become MathML, and drawings a part of the page. Nothing is loaded from elsewhere.

Formulas are $...$ within a line and ```math blocks, as GitHub sets them too; rows of `aligned` stand below each other.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert

ASSETS = Path(__file__).with_name("assets")
INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)
PRIME = re.compile(r"<msup>(<m[io]>[^<]+</m[io]>)<mo>&#x02032;</mo></msup>")
NAME = re.compile(
    r'<m[io]>([a-zA-Z]{2,})</m[io]>(?=(<mo stretchy="false">&#x00028;|<mrow><mo stretchy="true"|<mo>&#x02032;)?)'
)
DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*assets/(\w+)\.svg" ?/?>')


def mathml(formula, display=False):
    """A formula of LaTeX as MathML; ValueError if it holds what the converter does not know."""
    text = formula.replace("{aligned}", "{align*}").strip()
    made = convert(text, display="block" if display else "inline")
    unknown = re.search(r"<m[io]>(\\\w+|&)</m[io]>", made)
    if unknown:
        raise ValueError(f"mathml: {unknown[1]} is not known, in {formula}")
    made = PRIME.sub(r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>', made)  # many fonts have it raised
    # Functions stand apart from what is before them, and from an argument without a parenthesis.
    made = NAME.sub(lambda f: f'<mo lspace="0.17em" rspace="{0 if f[2] else 0.17}em">{f[1]}</mo>', made)
    # Browsers know styles of cells, and no columnalign any more.
    return re.sub(r'columnalign="(\w+)"', r'style="text-align: \1"', made)


def on_page_content(content, **_):
    """The page with its formulas and drawings in it."""
    content = INLINE.sub(lambda found: mathml(html.unescape(found[1])), content)
    content = DISPLAY.sub(lambda f: f'<div class="formula">{mathml(html.unescape(f[1]), display=True)}</div>', content)
    return DRAWING.sub(lambda found: drawing(*found.groups()), content)


def drawing(words, name):
    """An svg of assets/, said in the words of the page to who does not see it."""
    svg = (ASSETS / f"{name}.svg").read_text(encoding="utf-8")
    return svg.replace("<svg ", f'<svg aria-label="{words}" ', 1).replace("\n", "")
