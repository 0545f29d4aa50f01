/* Server-sent events out of a stream of bytes that may be cut anywhere, inside a character or a line end too. */

/** `push(bytes)` returns the data of every event that is now complete; comments and other fields are dropped. */
export class EventParser {
  #decoder = new TextDecoder("utf-8");
  #rest = "";
  #data = [];
  #halved = false; // the last character was a carriage return, which has ended its line: a line feed may still belong to it

  push(bytes) {
    const done = [];
    const fresh = this.#decoder.decode(bytes, { stream: true });
    if (!fresh) return done;
    const text = this.#rest + (this.#halved && fresh[0] === "\n" ? fresh.slice(1) : fresh);
    this.#halved = fresh.endsWith("\r");
    let at = 0;
    for (const end of text.matchAll(/\r\n|\n|\r/g)) {
      this.#line(text.slice(at, end.index), done);
      at = end.index + end[0].length;
    }
    this.#rest = text.slice(at);
    return done;
  }

  #line(line, done) {
    if (line === "") {
      if (this.#data.length) done.push(this.#data.join("\n"));
      this.#data = [];
    } else if (line === "data" || line.startsWith("data:")) {
      const value = line.slice(5);
      this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
    }
  }
}
