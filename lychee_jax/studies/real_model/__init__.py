"""What hybrid attention costs a real model in answers, beside what people would use instead; resumed line by line."""
