"""What the experts of a trained model do: analysis, figures, one page."""
