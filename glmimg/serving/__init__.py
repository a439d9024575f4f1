"""Pictures as a service: an OpenAI-compatible server, its worker process and its page.

Two processes. The front (app, routes, keys, queue: no torch) answers HTTP; the worker (engine, token batch) owns the
model and makes the pictures. A worker that dies takes no connection with it: it is started again, and what it was
working on is made anew, which the seeds make the same.
"""
