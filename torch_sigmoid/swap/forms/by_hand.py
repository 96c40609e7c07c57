"""How people write the MLP of a Llama themselves."""

from ..trees import Rewrite
from . import BY_HAND, Activation, Form
from .transformers import PRODUCT

LIBRARY, VERSIONS = BY_HAND, "any"

ACTIVATIONS: tuple[Activation, ...] = ()

FORMS = (
    Form(
        "gated MLP",
        LIBRARY,
        VERSIONS,
        (
            "def forward(self, x):\n    return self.w2(F.silu(self.w1(x)) * self.w3(x))",
            "def forward(self, x):\n    return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))",
            "def forward(self, x):\n    return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))",
            "def forward(self, x):\n    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))",
            "def forward(self, x):\n    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))",
            "def forward(self, x):\n    return self.c_proj(F.silu(self.w1(x)) * self.w2(x))",
            "def forward(self, x):\n    return self.w3(F.silu(self.w1(x)) * self.w2(x))",
            "def forward(self, x):\n    a = self.fc_1(x)\n    b = self.fc_2(x)\n    x = F.silu(a) * b\n    return self.proj(x)",
        ),
        (Rewrite("silu(GATE) * UP", "self.FUSED(GATE, UP)"),),
        fused="swiglu",
    ),
    Form(
        "gated MLP",
        LIBRARY,
        VERSIONS,
        (
            "def forward(self, x):\n    return self.w2(self.act(self.w1(x)) * self.w3(x))",
            "def forward(self, x):\n    return self.w2(self.silu(self.w1(x)) * self.w3(x))",
            "def forward(self, x):\n    return self.down(self.act(self.gate(x)) * self.up(x))",
            "def forward(self, x):\n    return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))",
        ),
        (PRODUCT,),
        activation="silu",
    ),
)
