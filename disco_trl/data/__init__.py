"""From rows to batches: columns, values, validation, tokenization, preparation, collation and sampling."""
