"""One step of arithmetic in bf16, and what PyTorch makes of it."""

import torch
import triton
import triton.language as tl


@triton.jit
def steps_kernel(x, y, out, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o, o < n, other=2.5)
    b_y = tl.load(y + o, o < n, other=1.0)
    if STEP == "add":
        b_out = b_x + b_y
    elif STEP == "sub":
        b_out = b_x - b_y
    elif STEP == "mul":
        b_out = b_x * b_y
    elif STEP == "div":
        b_out = (b_x / b_y).to(tl.bfloat16)
    elif STEP == "number":
        b_out = b_x * 2.7
    elif STEP == "where":
        b_out = tl.where(b_x > b_y, b_x, b_y)
    elif STEP == "maximum":
        b_out = tl.maximum(b_x, b_y)
    elif STEP == "abs":
        b_out = tl.abs(b_x)
    elif STEP == "neg":
        b_out = -b_x
    elif STEP == "full":
        b_out = tl.full([BLOCK], 1.1, tl.bfloat16)
    elif STEP == "sum":
        b_out = tl.zeros([BLOCK], tl.bfloat16) + tl.sum(tl.where(o < n, b_x, 0.0), 0)
    elif STEP == "max":
        b_out = tl.zeros([BLOCK], tl.bfloat16) + tl.max(b_x, 0)
    elif STEP == "cumsum":
        b_out = tl.cumsum(b_x, 0)
    elif STEP == "fp32":
        b_out = (b_x.to(tl.float32) * 1.001).to(tl.bfloat16)
    elif STEP == "fp16":
        b_out = b_x.to(tl.float16).to(tl.bfloat16)
    elif STEP == "int":
        b_out = b_x.to(tl.int32).to(tl.bfloat16)
    else:
        b_out = tl.reshape(tl.trans(tl.reshape(b_x, [4, BLOCK // 4])), [BLOCK])
    tl.store(out + o, b_out, o < n)


STEPS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "number": lambda x, y: x * torch.tensor(2.7).bfloat16(),
    "where": torch.maximum,
    "maximum": torch.maximum,
    "abs": lambda x, y: x.abs(),
    "neg": lambda x, y: -x,
    "full": lambda x, y: torch.full_like(x, 1.1),
    "sum": lambda x, y: x.float().sum().bfloat16().expand(len(x)),
    "max": lambda x, y: torch.cat([x, torch.tensor([2.5])]).max().bfloat16().expand(len(x)),
    "cumsum": lambda x, y: x.float().cumsum(0).bfloat16(),
    "fp32": lambda x, y: (x.float() * 1.001).bfloat16(),
    "fp16": lambda x, y: x.half().bfloat16(),
    "int": lambda x, y: x.int().bfloat16(),
}
