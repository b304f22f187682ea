"""Analysis of what the experts of a trained model do: figures, an HTML report, a live demo."""
