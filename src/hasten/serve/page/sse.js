/* Server-sent events out of a stream of bytes that may be cut anywhere, inside a character or a line end too. */

/** `push(bytes)` returns the data of every event that is now complete; comments and other fields are dropped. */
export class EventParser {
  #decoder = new TextDecoder("utf-8");
  #line = "";
  #data = [];
  #afterReturn = false;

  push(bytes) {
    const done = [];
    for (const character of this.#decoder.decode(bytes, { stream: true })) {
      const second = this.#afterReturn && character === "\n"; // the other half of a CRLF
      this.#afterReturn = character === "\r";
      if (second) continue;
      if (character === "\n" || character === "\r") this.#end(done);
      else this.#line += character;
    }
    return done;
  }

  #end(done) {
    const line = this.#line;
    this.#line = "";
    if (line === "") {
      if (this.#data.length) done.push(this.#data.join("\n"));
      this.#data = [];
    } else if (line === "data" || line.startsWith("data:")) {
      const value = line.slice(5);
      this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
    }
  }
}
