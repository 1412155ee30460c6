// What test_mobile.py asks of LigerSession: BUNDLE RUNTIME STATE.
import dev.liger.Generation
import dev.liger.LigerException
import dev.liger.LigerSession
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import java.io.File

fun main(words: Array<String>) = runBlocking {
    val (bundle, runtime, state) = words
    val session = LigerSession(File(bundle), runtime, 1)
    val tokens = session.complete("def add(a, b):", Generation(maxNewTokens = 40)).toList()
    println(tokens.joinToString(" ") { it.id.toString() })
    session.save(File(state))
    session.reset()
    session.load(File(state))
    println(session.complete("x", Generation(maxNewTokens = 20)).toList().joinToString(" ") { it.id.toString() })
    println(session.complete("x").take(3).toList().size)
    println(tokens.joinToString("") { it.text })
    println("--")
    refused { session.complete("").toList() }
    refused { LigerSession(File("/no/bundle"), runtime).close() }
    session.close()
    refused { session.complete("x").toList() }
}

private suspend fun refused(call: suspend () -> Unit) = try {
    call()
    println("not refused")
} catch (error: LigerException) {
    println(error.message)
}
