"""What learns: a causal LM and its tokenizer, how it attends, is sharded, checked and planned."""
