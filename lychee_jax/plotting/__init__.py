"""Pictures: roles and pages, scores, training."""
