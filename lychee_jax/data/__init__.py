"""Generated prose, facts and questions, for training, evaluation and studies alike."""
