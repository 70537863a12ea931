"""What the grid covers, with megawan.parity.POLICIES."""

STAGES = [0, 1, 2, 3]

# (task, heads, token grid). Heads: 4 and 8 take Ulysses 4, 6 takes Ulysses 2 and a ring, 5 a ring alone.
# 45 and 105 tokens divide by no number of ranks; of 5 tokens the last of four ranks has none.
PROBLEMS = [
    ["t2v", 4, [3, 3, 5]],
    ["t2v", 5, [5, 3, 7]],
    ["t2v", 6, [5, 1, 1]],
    ["t2v", 8, [5, 3, 7]],
    ["i2v", 4, [5, 3, 7]],
    ["i2v", 5, [3, 3, 5]],
    ["i2v", 6, [3, 3, 5]],
    ["i2v", 8, [5, 1, 1]],
    ["ti2v", 4, [3, 3, 5]],
    ["ti2v", 5, [5, 1, 1]],
    ["ti2v", 6, [5, 3, 7]],
    ["ti2v", 8, [3, 3, 5]],
]
ENGINE_PROBLEMS = [["t2v", 5, [3, 3, 5]], ["i2v", 6, [3, 3, 5]], ["ti2v", 4, [3, 3, 5]]]
