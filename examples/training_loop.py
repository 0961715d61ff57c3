"""Cross-entropy from hidden states in a plain PyTorch loop: the [tokens, vocabulary] logits never exist."""

import torch

import fastalign

VOCABULARY, WIDTH = 1000, 64


class NextToken(torch.nn.Module):
    """A recurrent language model that returns hidden states [B, T, WIDTH] in place of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.body = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(ids))[0]


def main() -> list[float]:
    torch.manual_seed(0)
    model = NextToken()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(VOCABULARY, (8, 33))
    losses = []
    for step in range(20):
        hidden = model(ids[:, :-1])
        loss = fastalign.linear_cross_entropy(hidden, model.head.weight, ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 5 == 0:
            print(f"step {step}: {loss.item():.3f} nats a token")
    return losses


if __name__ == "__main__":
    main()
