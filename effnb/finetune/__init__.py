"""Fine-tuning: adapters, chains of them and cheaper backward passes."""

__all__ = []
