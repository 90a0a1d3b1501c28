"""From documents and questions to padded batches of tokens: numpy and tokenizers only, no jax."""
