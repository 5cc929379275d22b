"""The drawings of the documentation: `python docs/drawings.py` writes docs/assets/*.svg.

Colours follow the reader's system where a drawing is an image, as on GitHub, and the site's own switch where
mathematics.py puts it into the page.
"""

from html import escape
from pathlib import Path

ASSETS = Path(__file__).with_name("assets")
COLOURS = {  # light, dark
    "ink": ("#1f2430", "#e6e9f0"),
    "line": ("#5b6478", "#9aa3b5"),
    "plain": ("#eef0f4", "#353a47"),
    "blue": ("#d6e2fb", "#2c3f70"),
    "orange": ("#fde3c2", "#64461d"),
    "green": ("#d3efdc", "#22513a"),
}
LIGHT, DARK = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
STYLE = (
    f"svg.drawing{{{LIGHT}}}@media(prefers-color-scheme:dark){{svg.drawing{{{DARK}}}}}"
    f"[data-md-color-scheme=default] svg.drawing{{{LIGHT}}}[data-md-color-scheme=slate] svg.drawing{{{DARK}}}"
    "svg.drawing text{fill:var(--ink);font:15px system-ui,sans-serif}svg.drawing .small{font-size:13px}"
    "svg.drawing .line{fill:none;stroke:var(--line);stroke-width:1.5}"
    "svg.drawing .dashed{stroke-dasharray:5 4}svg.drawing .head{fill:var(--line)}"
)
HEAD = 8  # length of an arrow's head


class Drawing:
    """A canvas of so many pixels, with what it shows in words."""

    def __init__(self, width: int, height: int, title: str):
        self.size, self.title, self.parts = (width, height), title, []

    def rect(self, x, y, w, h, colour="plain", dashed=False):
        """A rectangle of one of the colours, or with none."""
        fill = f"fill:var(--{colour})" if colour else "fill:none"
        kind = "line dashed" if dashed else "line"
        self.parts.append(f'<rect class="{kind}" style="{fill}" x="{x}" y="{y}" width="{w}" height="{h}" rx="4"/>')

    def polygon(self, points, colour):
        """A filled polygon."""
        at = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polygon class="line" style="fill:var(--{colour})" points="{at}"/>')

    def text(self, x, y, words, anchor="middle", small=False):
        """Words whose middle, start or end stands at x, their middle at the height y."""
        kind = ' class="small"' if small else ""
        self.parts.append(f'<text{kind} x="{x}" y="{y + 5}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x, y, w, h, *words, colour="plain"):
        """A rectangle with a line of words, and smaller ones below it."""
        self.rect(x, y, w, h, colour)
        for i, line in enumerate(words):
            self.text(x + w / 2, y + h / 2 + 19 * (i - (len(words) - 1) / 2), line, small=i > 0)

    def arrow(self, *points, dashed=False):
        """A line through points, parallel to the axes, with a head at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        bx, by = x1 - HEAD * dx, y1 - HEAD * dy
        path = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate((*points[:-1], (bx, by))))
        self.parts.append(f'<path class="line{" dashed" if dashed else ""}" d="{path}"/>')
        head = f"{x1},{y1} {bx + 4 * dy},{by + 4 * dx} {bx - 4 * dy},{by - 4 * dx}"
        self.parts.append(f'<polygon class="head" points="{head}"/>')

    def times(self, x, y, sign="∘"):
        """A circle with the sign of a product."""
        self.parts.append(f'<circle class="line" style="fill:var(--plain)" cx="{x}" cy="{y}" r="13"/>')
        self.text(x, y, sign)

    def svg(self):
        """The file."""
        w, h = self.size
        return (
            f'<svg class="drawing" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" '
            f'role="img"><title>{escape(self.title)}</title><style>{STYLE}</style>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def glu():
    """A gated feed-forward layer."""
    d = Drawing(560, 170, "A gated feed-forward layer: two projections of x, one through an activation, multiplied")
    d.text(20, 85, "x")
    d.arrow((32, 85), (60, 85), (60, 40), (90, 40))
    d.arrow((60, 85), (60, 130), (90, 130))
    d.box(90, 20, 80, 40, "x W_g", colour="blue")
    d.box(90, 110, 80, 40, "x W_u", colour="blue")
    d.arrow((170, 40), (205, 40))
    d.box(205, 20, 80, 40, "act", colour="orange")
    d.arrow((285, 40), (335, 40), (335, 72))
    d.arrow((170, 130), (335, 130), (335, 98))
    d.times(335, 85)
    d.arrow((348, 85), (400, 85))
    d.box(400, 65, 80, 40, "· W₂", colour="blue")
    d.arrow((480, 85), (525, 85))
    d.text(540, 85, "y")
    d.text(218, 76, "gate: how much", small=True)
    d.text(250, 146, "up: what", small=True)
    return d


def gau():
    """A gated attention unit."""
    d = Drawing(660, 260, "A gated attention unit: attention of one narrow head over wide values, times a gate")
    d.text(14, 130, "x")
    d.arrow((24, 130), (48, 130))
    d.box(48, 100, 96, 60, "x W + b", "norm, silu", colour="blue")
    d.arrow((144, 130), (166, 130), (166, 45), (190, 45))
    d.arrow((144, 130), (190, 130))
    d.arrow((166, 130), (166, 215), (190, 215))
    d.box(190, 25, 70, 40, "u", colour="green")
    d.box(190, 110, 70, 40, "v", colour="green")
    d.box(190, 195, 70, 40, "z", colour="orange")
    d.text(225, 76, "N × e", small=True)
    d.text(225, 161, "N × e", small=True)
    d.text(225, 246, "N × S, narrow", small=True)
    d.arrow((260, 215), (312, 215))
    d.text(285, 203, "q, k", small=True)
    d.box(312, 190, 160, 50, "A  (N × N)", "relu²(q kᵀ / n + bias)", colour="orange")
    d.arrow((392, 190), (392, 143))
    d.arrow((260, 130), (379, 130))
    d.times(392, 130, "×")
    d.arrow((405, 130), (487, 130))
    d.text(442, 118, "A v", small=True)
    d.arrow((260, 45), (500, 45), (500, 117))
    d.text(380, 33, "gate", small=True)
    d.times(500, 130)
    d.arrow((513, 130), (540, 130))
    d.box(540, 110, 60, 40, "· W_o", colour="blue")
    d.arrow((600, 130), (622, 130))
    d.text(642, 130, "+ x")
    return d


def attention():
    """Attention as its formula says."""
    d = Drawing(600, 200, "Attention as written: the matrices of scores and of probabilities are written and read")
    d.box(10, 45, 34, 100, "Q", colour="blue")
    d.text(58, 95, "×")
    d.box(72, 78, 100, 34, "Kᵀ", colour="blue")
    d.arrow((178, 95), (206, 95))
    d.box(206, 45, 100, 100, "S", "M × N", colour="orange")
    d.arrow((306, 95), (378, 95))
    d.text(340, 82, "softmax", small=True)
    d.box(378, 45, 100, 100, "P", "M × N", colour="orange")
    d.text(492, 95, "×")
    d.box(506, 45, 34, 100, "V", colour="blue")
    d.text(551, 95, "=")
    d.box(562, 45, 34, 100, "O", colour="green")
    d.text(342, 172, "written to memory, read again, kept for the backward", small=True)
    return d


def flash_attention():
    """Attention block by block."""
    d = Drawing(
        600, 250, "FlashAttention: one block of scores at a time, in fast memory; O and the log-sum-exp are written"
    )
    for x, name, colour in ((14, "Q", "blue"), (74, "K", "blue"), (118, "V", "blue"), (512, "O", "green")):
        d.rect(x, 45, 32, 140)
        d.rect(x, 85, 32, 36, colour)
        d.text(x + 16, 30, name)
    d.rect(562, 45, 12, 140)
    d.rect(562, 85, 12, 36, "green")
    d.text(568, 30, "LSE")
    d.arrow((112, 125), (112, 180))
    d.text(112, 202, "block by block", small=True)
    d.rect(184, 20, 290, 190, None, dashed=True)
    d.text(329, 38, "fast memory", small=True)
    d.arrow((150, 103), (204, 103))
    d.box(204, 76, 96, 54, "S = q kᵀ", "one block", colour="orange")
    d.arrow((300, 103), (340, 103))
    d.box(340, 76, 116, 54, "m, l, O", "corrected, added", colour="green")
    d.arrow((398, 130), (398, 165), (252, 165), (252, 130))
    d.text(325, 181, "next block of keys", small=True)
    d.arrow((456, 103), (512, 103))
    d.text(300, 234, "No M × N matrix is stored; the backward makes each block again from the LSE.", small=True)
    return d


def mixed_chunk():
    """Who sees whom in causal mixed chunk attention, and what is carried."""
    d = Drawing(600, 320, "Causal mixed chunk attention: scores within a chunk, one matrix for all chunks before it")
    side, left, top = 48, 40, 30
    for row in range(4):
        for column in range(4):
            x, y = left + side * column, top + side * row
            d.rect(x, y, side, side, "blue" if column < row else None, dashed=column > row)
            if column == row:
                d.polygon([(x, y), (x, y + side), (x + side, y + side)], "orange")
    d.text(left + 2 * side, 15, "keys", small=True)
    d.text(18, top + 2 * side, "q", small=True)
    d.rect(262, 42, 26, 26, "orange")
    d.text(298, 46, "own chunk of C tokens: quadratic", "start")
    d.text(298, 66, "score(quad_q quad_kᵀ / C + bias) v", "start", small=True)
    d.rect(262, 106, 26, 26, "blue")
    d.text(298, 110, "chunks before: linear", "start")
    d.text(298, 130, "lin_q KV / n,  KV = Σ lin_kᵀ v,  S × E", "start", small=True)
    d.rect(262, 170, 26, 26, None, dashed=True)
    d.text(298, 183, "not seen", "start")
    for i in range(4):
        d.box(40 + 140 * i, 262, 90, 40, f"chunk {i + 1}", colour="orange")
        if i < 3:
            d.arrow((130 + 140 * i, 282), (180 + 140 * i, 282))
            d.text(154 + 140 * i, 270, "KV", small=True)
    return d


def gau_panel():
    """Panels of scores times tiles of columns, on a GPU."""
    d = Drawing(620, 210, "A panel of scores times tiles of the values' columns, times the gate")
    d.text(150, 22, "keys (N)", small=True)
    d.box(70, 60, 160, 64, "A", "a panel of rows", colour="orange")
    d.text(36, 92, "rows", small=True)
    d.text(250, 92, "×")
    d.text(345, 22, "columns (E)", small=True)
    for i in range(3):
        d.box(270 + 50 * i, 40, 50, 110, "tile" if i == 1 else "", colour="blue" if i == 1 else "plain")
        d.box(500 + 38 * i, 60, 38, 64, "", colour="green" if i == 1 else "plain")
    d.arrow((424, 92), (496, 92))
    d.text(459, 78, "∘ gate", small=True)
    d.text(557, 44, "out", small=True)
    d.text(345, 178, "one program for each tile, over all keys", small=True)
    return d


def glu_linear():
    """Two products and a unit, or one kernel."""
    d = Drawing(600, 270, "Two products and then the unit, or one kernel with the two weights side by side")
    d.text(10, 16, "two products, then the unit", "start", small=True)
    d.text(20, 85, "x")
    d.arrow((32, 85), (54, 85), (54, 55), (84, 55))
    d.arrow((54, 85), (54, 115), (84, 115))
    for y, side in ((35, "g"), (95, "u")):
        d.box(84, y, 76, 40, f"· W_{side}ᵀ", colour="blue")
        d.arrow((160, y + 20), (196, y + 20))
        d.box(196, y, 130, 40, f"{side} in memory", colour="orange")
    d.arrow((326, 55), (352, 55), (352, 85), (384, 85))
    d.parts.append('<path class="line" d="M326 115 L352 115 L352 85"/>')
    d.box(384, 65, 100, 40, "act(g) ∘ u", colour="green")
    d.arrow((484, 85), (530, 85))
    d.text(552, 85, "out")
    d.text(10, 176, "one kernel", "start", small=True)
    d.text(20, 220, "x")
    d.arrow((32, 220), (84, 220))
    d.box(84, 195, 152, 50, "· [W_g | W_u]ᵀ", "rows alternate", colour="blue")
    d.arrow((236, 220), (384, 220))
    d.text(308, 207, "g, u in registers", small=True)
    d.box(384, 200, 100, 40, "act(g) ∘ u", colour="green")
    d.arrow((484, 220), (530, 220))
    d.text(552, 220, "out")
    return d


def mixed_chunk_scan():
    """Both parts of a chunk as one product, on a GPU."""
    d = Drawing(620, 270, "Both parts of a chunk are one product: scores beside lin_Q, times values above KV")
    d.text(130, 20, "C", small=True)
    d.text(228, 20, "S", small=True)
    d.text(34, 100, "rows of", small=True)
    d.text(34, 118, "a chunk", small=True)
    d.box(68, 40, 124, 124, "A  (C × C)", "score, mask", colour="orange")
    d.box(192, 40, 72, 124, "lin_Q", colour="blue")
    d.text(130, 182, "from its panel", small=True)
    d.text(286, 102, "×")
    d.text(378, 20, "tile of E", small=True)
    d.box(326, 40, 104, 124, "V", colour="orange")
    d.box(326, 164, 104, 64, "KV / n", "in registers", colour="blue")
    d.text(313, 102, "C", small=True)
    d.text(313, 196, "S", small=True)
    d.arrow((436, 132), (530, 132))
    d.text(481, 117, "∘ act(gate)", small=True)
    d.box(530, 70, 74, 124, "out", colour="green")
    d.text(378, 250, "then KV += lin_Kᵀ V", small=True)
    return d


DRAWINGS = (glu, gau, attention, flash_attention, mixed_chunk, gau_panel, glu_linear, mixed_chunk_scan)


def files():
    """What each file holds."""
    return {f"{draw.__name__}.svg": draw().svg() for draw in DRAWINGS}


if __name__ == "__main__":
    for name, text in files().items():
        (ASSETS / name).write_text(text, encoding="utf-8")
