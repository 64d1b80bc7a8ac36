"""`mingle.Merger`: fine-tuned models arrive one after another, and one model serves all of their tasks."""
