"""Does dropping pay? Fine-tune small language models on real text with many policies, at equal steps and at equal time."""
