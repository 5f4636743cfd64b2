"""OpenAI's protocol on the engine: an event loop in one thread, the engine in another one."""
