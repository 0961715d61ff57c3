"""Words for texts of tiny models."""

WORDS = (
    *("the", "a", "film", "story", "actor", "is", "was"),
    *("good", "bad", "dull", "bright", "and", "but", "never"),
)
