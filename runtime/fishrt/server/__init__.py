"""The server: every HTTP dialect over one TTS. Of all the runtime, only this folder imports FastAPI, Starlette and uvicorn."""
