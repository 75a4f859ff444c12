"""Groups, leak-free splits and folds."""
